//! A name that is taken stays below the folder that it is joined to, and names one repository.

use std::path::{Component, Path};

use warmdock::git::name::RepoName;

/// Panics where it does not hold.
pub fn check(text: &str) {
    let Ok(name) = RepoName::parse(text) else {
        return;
    };
    let root = Path::new("/root");
    let folder = name.folder_below(root);
    let below = folder.strip_prefix(root).expect("below the root");
    let mut depth = 0;
    for component in below.components() {
        let Component::Normal(part) = component else {
            panic!("{component:?} in {folder:?}");
        };
        let part = part.to_str().expect("ASCII");
        assert!(
            part.is_ascii() && !part.eq_ignore_ascii_case(".git") && part.len() < 256,
            "{part:?}"
        );
        assert!(!part.contains(['\\', '%', '\0', '\n', ' ']), "{part:?}");
        depth += 1;
    }
    assert_eq!(depth, name.to_string().split('/').count(), "{folder:?}");
    // No mirror lies in another one. The first component is the host, which has no mirror itself.
    let inner = below.parent().expect("host and path");
    assert!(
        inner
            .components()
            .skip(1)
            .all(|part| !part.as_os_str().to_string_lossy().ends_with(".git"))
    );

    let again = RepoName::parse(&name.to_string()).expect("what is shown is a name");
    assert_eq!(again, name);
    for suffix in [".git", "/", ".git/"] {
        if let Ok(other) = RepoName::parse(&format!("{name}{suffix}")) {
            assert_eq!(other, name, "with {suffix}");
        }
    }
}
