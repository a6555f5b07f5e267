//! What is asked of a registry names one file below a folder, and only under one path.

use std::path::{Component, Path};

use warmdock::crates::name::Wanted;

/// Panics where it does not hold.
pub fn check(path: &str) {
    match Wanted::parse(path) {
        Some(Wanted::Entry(name)) => {
            assert_eq!(name.index_path(), path);
            assert_plain(path);
        }
        Some(Wanted::File(file)) => {
            let again = format!("dl/{}/{}/{}", file.name, file.version, file.digest);
            assert_eq!(again.to_lowercase(), path.to_lowercase());
            assert_plain(path);
        }
        Some(Wanted::Config) => assert_eq!(path, "config.json"),
        Some(Wanted::Api) => assert!(path.starts_with("api/v1")),
        None => {}
    }
}

/// Each part is the name of a file, and says nothing to a shell, an address or a file system.
fn assert_plain(path: &str) {
    let parts = path.split('/').count();
    let mut components = 0;
    for component in Path::new(path).components() {
        let Component::Normal(part) = component else {
            panic!("{component:?} in {path:?}");
        };
        let part = part.to_str().expect("ASCII");
        assert!(part.is_ascii() && part.len() <= 128, "{part:?}");
        assert!(
            !part.contains(['\\', '%', '\0', '\n', ' ', '?', '#', '"']),
            "{part:?}"
        );
        components += 1;
    }
    assert_eq!(components, parts, "{path:?}");
}
