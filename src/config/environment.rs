//! What the process's surroundings say about the defaults.

use std::ffi::OsString;
use std::path::PathBuf;

/// The environment variables that matter to the configuration, taken once, so that tests need not set any.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `WARMDOCK_CONFIG`
    pub config: Option<OsString>,
    /// `XDG_CACHE_HOME`
    pub cache_home: Option<OsString>,
    /// `HOME`
    pub home: Option<OsString>,
    /// `SSH_AUTH_SOCK`
    pub auth_socket: Option<OsString>,
}

impl Environment {
    /// What holds for this process now.
    pub fn of_process() -> Self {
        Self {
            config: std::env::var_os("WARMDOCK_CONFIG"),
            cache_home: std::env::var_os("XDG_CACHE_HOME"),
            home: std::env::var_os("HOME"),
            auth_socket: std::env::var_os("SSH_AUTH_SOCK"),
        }
    }

    /// Where data goes when `data_dir` is not set: the user's cache folder, or the folder for temporary files when
    /// there is no user to speak of. A path that is not absolute counts as unset, as the XDG specification says.
    pub fn data_dir(&self) -> PathBuf {
        let absolute = |text: &Option<OsString>| {
            text.as_ref()
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        absolute(&self.cache_home)
            .or_else(|| absolute(&self.home).map(|home| home.join(".cache")))
            .unwrap_or_else(std::env::temp_dir)
            .join("warmdock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data_dir(cache_home: Option<&str>, home: Option<&str>) -> PathBuf {
        Environment {
            config: None,
            cache_home: cache_home.map(Into::into),
            home: home.map(Into::into),
            auth_socket: None,
        }
        .data_dir()
    }

    #[test]
    fn data_goes_to_the_cache_folder() {
        assert_eq!(
            data_dir(Some("/c"), Some("/h")),
            PathBuf::from("/c/warmdock")
        );
        assert_eq!(
            data_dir(None, Some("/h")),
            PathBuf::from("/h/.cache/warmdock")
        );
        assert_eq!(
            data_dir(Some(""), Some("/h")),
            PathBuf::from("/h/.cache/warmdock")
        );
        assert_eq!(
            data_dir(Some("relative"), Some("/h")),
            PathBuf::from("/h/.cache/warmdock")
        );
        assert_eq!(data_dir(None, None), std::env::temp_dir().join("warmdock"));
        assert_eq!(
            data_dir(None, Some("")),
            std::env::temp_dir().join("warmdock")
        );
    }
}
