//! From JSON text to the shape of the file.

use serde::Deserialize;
use serde_json::Value;
use serde_path_to_error::{Path, Segment};

use super::duplicate::duplicate;
use super::file::ConfigFile;
use super::given::kind_of;
use super::problem::{Problems, quote};

/// The file as far as it could be read, and what was wrong with the rest.
#[derive(Default)]
pub struct Parsed {
    pub file: ConfigFile,
    pub problems: Problems,
}

/// Reads the whole text and reports every unknown key and every value of the wrong shape.
///
/// Serde stops at the first error. So that people need not mend their file one error at a time, what is wrong is taken
/// out and the rest is read again. Values themselves are not looked at here, they are all [`super::given::Given`].
pub fn parse(text: &[u8]) -> Parsed {
    let mut problems = Problems::default();
    let mut value: Value = match serde_json::from_slice(text) {
        Ok(value) => value,
        Err(error) => {
            problems.add(
                "",
                format!("text that is no JSON ({error})"),
                "a JSON object",
            );
            return Parsed {
                file: ConfigFile::default(),
                problems,
            };
        }
    };
    if !value.is_object() {
        problems.add("", kind_of(&value), "a JSON object");
        return Parsed {
            file: ConfigFile::default(),
            problems,
        };
    }
    if let Some(key) = duplicate(text) {
        problems.add(key, "the key twice", "it once");
    }
    for key in SECTIONS {
        take_out_lists(&mut value, key, &mut problems);
    }
    loop {
        let error = match read(&value) {
            Ok(file) => return Parsed { file, problems },
            Err(error) => error,
        };
        let key = error.path().to_string();
        let message = error.inner().to_string();
        let found = match message.strip_prefix("unknown field ") {
            Some(_) => "an unknown key".into(),
            None => at(&mut value, error.path())
                .map_or("nothing", |value| kind_of(value))
                .to_string(),
        };
        problems.add(&key, found, expected(&message));
        if !take_out(&mut value, error.path()) {
            // Nothing was taken out, so that reading again would find the same for ever.
            return Parsed {
                file: ConfigFile::default(),
                problems,
            };
        }
    }
}

/// Where objects stand. Serde would take a list for one, its items for the values in order.
const SECTIONS: [&str; 16] = [
    "/listen",
    "/listen/tls",
    "/listen/ssh",
    "/storage",
    "/storage/s3",
    "/git",
    "/git/upstreams/*",
    "/crates",
    "/crates/registries/*",
    "/access",
    "/access/tokens/*",
    "/access/keys",
    "/access/keys/entries/*",
    "/access/keys/authorities/*",
    "/access/ask_upstream/*",
    "/limits",
];

fn take_out_lists(value: &mut Value, pointer: &str, problems: &mut Problems) {
    if let Some(list) = pointer.strip_suffix("/*") {
        let key = list.trim_start_matches('/').replace('/', ".");
        let Some(items) = value.pointer_mut(list).and_then(Value::as_array_mut) else {
            return;
        };
        for (at, item) in items
            .iter_mut()
            .enumerate()
            .filter(|(_, item)| item.is_array())
        {
            problems.add(format!("{key}[{at}]"), kind_of(item), "an object");
            *item = Value::Object(serde_json::Map::new());
        }
    } else if let Some(section) = value.pointer_mut(pointer)
        && section.is_array()
    {
        let key = pointer.trim_start_matches('/').replace('/', ".");
        problems.add(key, kind_of(section), "an object");
        *section = Value::Object(serde_json::Map::new());
    }
}

fn read(source: &Value) -> Result<ConfigFile, serde_path_to_error::Error<serde_json::Error>> {
    let mut track = serde_path_to_error::Track::new();
    ConfigFile::deserialize(serde_path_to_error::Deserializer::new(source, &mut track))
        .map_err(|error| serde_path_to_error::Error::new(track.path(), error))
}

/// What serde's message says is allowed, in our words.
fn expected(message: &str) -> String {
    match message.rsplit_once(", expected ") {
        Some((_, allowed)) if message.starts_with("unknown field") => {
            let allowed = allowed.strip_prefix("one of ").unwrap_or(allowed);
            format!(
                "one of the keys {}",
                allowed.replace('`', "").replace(" or ", ", ")
            )
        }
        Some((_, "a sequence")) => "a list".into(),
        Some((_, allowed)) if allowed.starts_with("struct ") => "an object".into(),
        Some((_, allowed)) => allowed.into(),
        None => quote(message),
    }
}

fn at<'a>(value: &'a mut Value, path: &Path) -> Option<&'a mut Value> {
    path.iter().try_fold(value, |value, segment| match segment {
        Segment::Seq { index } => value.get_mut(*index),
        Segment::Map { key } => value.get_mut(key),
        _ => None,
    })
}

/// Takes the value at `path` out of its object, or empties it in its list, where the others must keep their places.
fn take_out(root: &mut Value, path: &Path) -> bool {
    let segments: Vec<&Segment> = path.iter().collect();
    let Some((last, above)) = segments.split_last() else {
        return false;
    };
    let parent = above.iter().try_fold(root, |value, segment| match segment {
        Segment::Seq { index } => value.get_mut(*index),
        Segment::Map { key } => value.get_mut(key),
        _ => None,
    });
    match (parent, last) {
        (Some(Value::Object(object)), Segment::Map { key }) => object.remove(key).is_some(),
        (Some(Value::Array(list)), Segment::Seq { index }) => match list.get_mut(*index) {
            Some(element) if !element.is_object() => {
                *element = Value::Object(serde_json::Map::new());
                true
            }
            _ => false,
        },
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        parse(text.as_bytes())
            .problems
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn every_problem_is_reported_at_its_place() {
        let text = r#"{
            "colour": 1,
            "listen": { "port": 8080 },
            "storage": "50GiB",
            "git": {
                "upstreams": [ { "host": "a" }, "hunter2", { "url": "x", "token": "hunter2" } ],
                "warm": { "a": 1 },
                "max_age": [ "any value is looked at later" ]
            },
            "access": { "tokens": [ { "repos": 5 } ] }
        }"#;
        assert_eq!(
            problems(text),
            [
                "access.tokens[0].repos: found a number; expected a list",
                "colour: found an unknown key; expected one of the keys $schema, listen, data_dir, storage, git, crates, access, limits",
                "git.upstreams[1]: found text; expected an object",
                "git.upstreams[2].token: found an unknown key; expected one of the keys host, url, token_file, auth, user, key_file, passphrase_file, known_hosts_file, repos",
                "git.warm: found an object; expected a list",
                "listen.port: found an unknown key; expected one of the keys http, tls, public_url, trusted_proxies, ssh",
                "storage: found text; expected an object",
            ]
        );
    }

    #[test]
    fn what_is_no_object_is_refused() {
        assert_eq!(problems("[]"), ["found a list; expected a JSON object"]);
        assert_eq!(problems("null"), ["found null; expected a JSON object"]);
        for text in ["", "{", "{} {}", "{\"listen\": }", "\u{0}"] {
            let problems = problems(text);
            assert_eq!(problems.len(), 1, "{text}: {problems:?}");
            assert!(
                problems[0].starts_with("found text that is no JSON ("),
                "{problems:?}"
            );
        }
        assert_eq!(parse(b"{\"\xff\": 1}").problems.iter().count(), 1);
    }

    #[test]
    fn keys_are_shown_without_what_moves_a_cursor() {
        let shown = problems(r#"{"a\u001b[2J\nb": 1, "größe": 1}"#).join(" ");
        assert!(
            shown.contains(r"a\u{1b}[2J\nb: found an unknown key"),
            "{shown}"
        );
        assert!(shown.contains("größe: found an unknown key"), "{shown}");
    }

    #[test]
    fn a_key_that_stands_twice_is_refused() {
        assert_eq!(
            problems(r#"{"git": {"max_age": "1s", "max_age": "2s"}}"#),
            ["git.max_age: found the key twice; expected it once"]
        );
        assert_eq!(
            problems(r#"{"git": {}, "git": {}}"#),
            ["git: found the key twice; expected it once"]
        );
    }

    #[test]
    fn absence_is_the_default() {
        let given = serde_json::to_value(parse(br#"{"limits": {"connections": 5}}"#).file).unwrap();
        let default = serde_json::to_value(ConfigFile::default()).unwrap();
        assert_eq!(given["limits"]["connections"], 5);
        assert_eq!(
            given["limits"]["drain_timeout"],
            default["limits"]["drain_timeout"]
        );
        assert_eq!(given["git"], default["git"]);
    }
}
