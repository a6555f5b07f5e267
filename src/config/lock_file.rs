//! Lock files whose crates are fetched ahead.

use std::borrow::Cow;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::given::{AbsolutePath, Written, kind_of};
use super::problem::quote;
use crate::git::name::RepoName;

/// Where a `Cargo.lock` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockFile {
    /// On this machine; absolute.
    OnDisk(PathBuf),
    /// In a repository, at its HEAD.
    InRepo {
        repo: RepoName,
        /// Below the root of the repository, without `.` and `..`.
        path: String,
    },
}

const IN_ROOT: &str = "Cargo.lock";

impl Written for LockFile {
    fn expected() -> String {
        "the absolute path of a Cargo.lock, or `{\"git\": \"host/path\", \"path\": \"Cargo.lock\"}`"
            .into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::Object(object) => in_repo(object),
            Value::String(_) => AbsolutePath::read(value).map(|path| Self::OnDisk(path.0)),
            other => Err(kind_of(other).into()),
        }
    }
}

fn in_repo(object: &Map<String, Value>) -> Result<LockFile, String> {
    if let Some(key) = object
        .keys()
        .find(|key| !matches!(key.as_str(), "git" | "path"))
    {
        return Err(format!("an object with the unknown key {}", quote(key)));
    }
    let repo = object.get("git").ok_or("an object without `git`")?;
    let path = match object.get("path") {
        None => IN_ROOT,
        Some(path) => path.as_str().ok_or_else(|| kind_of(path))?,
    };
    if path.is_empty() || path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(format!(
            "the path {}, which is none below a repository",
            quote(path)
        ));
    }
    Ok(LockFile::InRepo {
        repo: RepoName::read(repo)?,
        path: path.into(),
    })
}

impl Serialize for LockFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::OnDisk(path) => path.serialize(serializer),
            Self::InRepo { repo, path } => {
                json!({ "git": repo.to_string(), "path": path }).serialize(serializer)
            }
        }
    }
}

impl JsonSchema for LockFile {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "LockFile".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "string", "pattern": "^/" },
                {
                    "type": "object",
                    "properties": { "git": { "type": "string" }, "path": { "type": "string" } },
                    "required": ["git"],
                    "additionalProperties": false,
                },
            ],
            "examples": ["/config/Cargo.lock", { "git": "github.com/my-org/app", "path": "Cargo.lock" }],
        })
    }
}
