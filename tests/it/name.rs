//! Names of repositories: whatever is taken stays inside its folder, whatever is refused says why.

use std::path::{Component, Path};

use proptest::prelude::*;
use warmdock::git::name::{InvalidName, RepoName};

#[test]
fn taken() {
    let table = [
        ("github.com/rust-lang/log", "github.com", "rust-lang/log"),
        (
            "github.com/rust-lang/log.git",
            "github.com",
            "rust-lang/log",
        ),
        ("github.com/rust-lang/log/", "github.com", "rust-lang/log"),
        (
            "github.com/rust-lang/log.git/",
            "github.com",
            "rust-lang/log",
        ),
        ("GitHub.com/Rust-Lang/Log", "github.com", "Rust-Lang/Log"),
        ("git.corp.example:8443/a", "git.corp.example:8443", "a"),
        ("h/~user/repo", "h", "~user/repo"),
        ("h/a/b/c/d/e/f", "h", "a/b/c/d/e/f"),
        ("h/a.b_c-d+e@f", "h", "a.b_c-d+e@f"),
        ("h/git", "h", "git"),
        ("h/a.gitx", "h", "a.gitx"),
        ("github.com/org/.github", "github.com", "org/.github"),
        ("github.com/org/.github.git", "github.com", "org/.github"),
        ("h/.dotfiles", "h", ".dotfiles"),
        ("h/.a/.b/..c", "h", ".a/.b/..c"),
    ];
    for (text, host, path) in table {
        let name = RepoName::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!((name.host(), name.path()), (host, path), "{text}");
    }
}

#[test]
fn refused() {
    let long_segment = format!("h/{}", "a".repeat(300));
    let long = format!("h/{}", "a/".repeat(400));
    let deep = format!("h/{}", vec!["a"; 40].join("/"));
    let table = [
        "",
        "/",
        "h",
        "h/",
        "/a",
        "h//",
        "h//a",
        "h/a//b",
        "h/.git",
        "h/.git.git",
        "h/.git/a",
        "h/a/.git",
        "h/a/.GIT",
        "h/a/.git/b",
        "h.git/a",
        "h.GIT/a",
        "h/.",
        "h/..",
        "h/../a",
        "h/a/..",
        "h/a/../b",
        "h/a/./b",
        "h/...",
        "h/..git",
        "h/a/...git",
        "h/a.git/b",
        "h/a.GIT/b",
        "h/a.git.git",
        "h/a.git/objects",
        "../h/a",
        "./a",
        ".h/a",
        "h./../a",
        "h..x/a",
        "-h/a",
        "h/a\0b",
        "h/a\nb",
        "h/a b",
        "h/a\\b",
        "h\\a/b",
        "h/%2e%2e",
        "h/a%00",
        "h/a%2fb",
        "h/é",
        "é/a",
        "h/a?b",
        "h/a#b",
        "h/a:b",
        "h:/a",
        "h:x/a",
        "h:123456/a",
        "h:1:2/a",
        "user@h/a",
        "https://h/a",
        "h/a*b",
        "h/a|b",
        "h/a;b",
        "h/$a",
        "h/a\u{202e}b",
        "h/a\u{2215}b",
        "[::1]/a",
        "h/a'b",
        "h/\"a",
        "h/<a>",
        "h/{a}",
        "h/a\tb",
        "h/a\r",
        &long_segment,
        &long,
        &deep,
    ];
    for text in table {
        let refused = RepoName::parse(text);
        assert!(refused.is_err(), "{text:?} was taken as {refused:?}");
    }
}

#[test]
fn the_length_at_its_limit_and_one_more() {
    use warmdock::git::name::{MAX_NAME, MAX_SEGMENTS};
    let of_length = |length: usize| {
        let mut text = "h".to_owned();
        while text.len() < length {
            let segment = (length - text.len() - 1).min(100);
            // No segment of nothing at the end.
            let segment = if length - text.len() - 1 - segment == 1 {
                segment - 1
            } else {
                segment
            };
            text = format!("{text}/{}", "a".repeat(segment));
        }
        text
    };
    assert!(RepoName::parse(&of_length(MAX_NAME)).is_ok());
    assert_eq!(
        RepoName::parse(&of_length(MAX_NAME + 1)),
        Err(InvalidName::TooLong)
    );
    let of_segments = |count| format!("h/{}", vec!["a"; count].join("/"));
    assert!(RepoName::parse(&of_segments(MAX_SEGMENTS)).is_ok());
    assert_eq!(
        RepoName::parse(&of_segments(MAX_SEGMENTS + 1)),
        Err(InvalidName::TooLong)
    );
}

/// What attackers write, put together at random.
fn nasty() -> impl Strategy<Value = String> {
    let parts = [
        "..",
        ".",
        "/",
        "//",
        "\\",
        "\0",
        "%2e",
        "%2f",
        ".git",
        ".GIT",
        "a",
        "B",
        "github.com",
        "h",
        "~",
        "@",
        ":",
        "1",
        " ",
        "\n",
        "é",
        "\u{202e}",
        "objects",
        "HEAD",
        "-",
        "--upload-pack=x",
        "$(x)",
        ".lock",
        "con",
        "a.b",
    ];
    prop::collection::vec(prop::sample::select(parts.to_vec()), 0..12)
        .prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn whatever_is_taken_stays_below_its_folder(text in prop_oneof![".{0,60}", nasty(), "[a-z./~%-]{0,40}"]) {
        if let Ok(name) = RepoName::parse(&text) {
            let root = Path::new("/data/git");
            let folder = name.folder_below(root);
            let below = folder.strip_prefix(root).unwrap();
            prop_assert!(below.components().all(|part| matches!(part, Component::Normal(_))), "{folder:?}");
            prop_assert!(below.components().count() >= 2);
            prop_assert!(!folder.to_str().unwrap().contains(['\0', '\\', '%', '\n', ' ']));
            prop_assert!(!below.components().any(|part| part.as_os_str().eq_ignore_ascii_case(".git")), "{folder:?}");
            // No mirror lies inside another one.
            let inner = below.parent().unwrap();
            prop_assert!(!inner.components().any(|part| part.as_os_str().to_str().unwrap().ends_with(".git")), "{folder:?}");
            prop_assert!(below.components().all(|part| part.as_os_str().len() <= 255));
        }
    }

    #[test]
    fn what_is_shown_is_taken_again_and_is_the_same(text in prop_oneof![nasty(), "[a-zA-Z0-9.]{1,9}(/[a-zA-Z0-9._~@+-]{1,9}){1,5}"]) {
        if let Ok(name) = RepoName::parse(&text) {
            let again = RepoName::parse(&name.to_string());
            prop_assert_eq!(again.as_ref(), Ok(&name));
            let with_git = RepoName::parse(&format!("{name}.git"));
            prop_assert_eq!(with_git.as_ref(), Ok(&name));
        }
    }

    #[test]
    fn usual_names_are_taken(host in "[a-z][a-z0-9]{0,9}\\.[a-z]{2,3}", path in "\\.?[A-Za-z0-9_][A-Za-z0-9_-]{0,20}(/\\.?[A-Za-z0-9_][A-Za-z0-9_.-]{0,18}[A-Za-z0-9_]){1,4}") {
        prop_assume!(!path.to_lowercase().contains(".git"));
        // Such a host would be taken for a mirror.
        prop_assume!(!host.ends_with(".git"));
        let text = format!("{host}/{path}");
        let name = RepoName::parse(&text).unwrap();
        prop_assert_eq!(name.to_string(), text);
    }
}
