//! A value as it stands in the file, before anybody has looked at it.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::PathBuf;

use russh::keys::PublicKey;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::problem::quote;
use super::units::{Size, Span};
use super::upstream_url::{self, UpstreamUrl};
use crate::git::name::{InvalidName, RepoName};

/// A place in the file where a `T` is expected. Takes any JSON value, so that reading the file does not end at the
/// first wrong one; [`Given::read`] says whether it is a `T`. Its schema is that of `T`.
pub struct Given<T> {
    value: Value,
    kind: PhantomData<fn() -> T>,
}

/// A type that is written as one JSON value.
pub trait Written: Sized {
    /// What is allowed, in words that go behind "expected".
    fn expected() -> String;

    /// # Errors
    /// What was found instead, in words that go behind "found".
    fn read(value: &Value) -> Result<Self, String>;
}

impl<T> Given<T> {
    /// The value that `text` stands for.
    pub fn text(text: impl Into<String>) -> Self {
        Self {
            value: Value::String(text.into()),
            kind: PhantomData,
        }
    }

    /// The value that is this number.
    pub fn number(number: usize) -> Self {
        Self {
            value: number.into(),
            kind: PhantomData,
        }
    }
}

impl<T: Written> Given<T> {
    /// # Errors
    /// What was found instead of a `T`.
    pub fn read(&self) -> Result<T, String> {
        T::read(&self.value)
    }
}

impl<T> Clone for Given<T> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            kind: PhantomData,
        }
    }
}

impl<'de, T> Deserialize<'de> for Given<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self {
            value,
            kind: PhantomData,
        })
    }
}

impl<T> Serialize for Given<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.value.serialize(serializer)
    }
}

impl<T: JsonSchema> JsonSchema for Given<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

/// What kind of JSON value this is. SECURITY: without its content, which may be a secret in the wrong place.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Whether there is nothing in `text` but letters and digits of ASCII, `.`, `-` and `_`.
pub(super) fn is_word(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
}

fn text_of(value: &Value) -> Result<&str, String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Number(number) => Err(format!("the number {number}")),
        other => Err(kind_of(other).into()),
    }
}

impl Written for String {
    fn expected() -> String {
        "text".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        text_of(value).map(Into::into)
    }
}

impl Written for usize {
    fn expected() -> String {
        "a whole number".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        let number = value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| match value {
            Value::String(text) => quote(text),
            Value::Number(number) => number.to_string(),
            other => kind_of(other).into(),
        })
    }
}

impl Written for Size {
    fn expected() -> String {
        "a size in quotes with its unit, such as \"50GiB\" or \"500MB\"".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        let text = text_of(value)?;
        Self::parse(text).map_err(|_| quote(text))
    }
}

impl Written for Span {
    fn expected() -> String {
        "a duration in quotes with its unit, such as \"10s\", \"500ms\" or \"1h 30m\", of at most 366 days".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        let text = text_of(value)?;
        Self::parse(text).map_err(|_| quote(text))
    }
}

impl Written for SocketAddr {
    fn expected() -> String {
        "an IP address and a port, such as \"0.0.0.0:8080\" or \"[::]:8080\"".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        let text = text_of(value)?;
        text.parse().map_err(|_| quote(text))
    }
}

/// The absolute path of a file or folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbsolutePath(pub PathBuf);

impl Written for AbsolutePath {
    fn expected() -> String {
        "an absolute path, beginning with `/`".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        let text = text_of(value)?;
        if text.contains('\0') {
            return Err("text with a NUL in it".into());
        }
        // SECURITY: who writes a token where the path of its file belongs shall not find it in the log.
        if !text.starts_with('/') {
            return Err("text that is no absolute path (not shown, it may be a secret)".into());
        }
        Ok(Self(text.into()))
    }
}

impl JsonSchema for AbsolutePath {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "AbsolutePath".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^/" })
    }
}

/// A public key as OpenSSH writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKeyText(pub PublicKey);

impl Written for PublicKeyText {
    fn expected() -> String {
        "a public key in one line, such as \"ssh-ed25519 AAAA… name\"".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        // SECURITY: who writes a private key here shall not find it in the log.
        let wrong = |_| "text that is none (not shown, it may be a secret)".to_owned();
        PublicKey::from_openssh(text_of(value)?.trim())
            .map(Self)
            .map_err(wrong)
    }
}

impl JsonSchema for PublicKeyText {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "PublicKey".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^\\S+ \\S+" })
    }
}

impl Written for UpstreamUrl {
    fn expected() -> String {
        upstream_url::ALLOWED.into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        Self::parse(text_of(value)?).map_err(|wrong| wrong.to_string())
    }
}

/// The name of a repository, as text.
impl Written for RepoName {
    fn expected() -> String {
        "a repository as `host/path`, such as \"github.com/my-org/app\"".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        let text = text_of(value)?;
        Self::parse(text).map_err(|wrong: InvalidName| format!("{} ({wrong})", quote(text)))
    }
}

/// One of the words of an enumeration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word<T>(pub T);

impl<T: DeserializeOwned + JsonSchema> Written for Word<T> {
    fn expected() -> String {
        let mut words = Vec::new();
        collect_words(
            T::json_schema(&mut SchemaGenerator::default()).as_value(),
            &mut words,
        );
        format!("one of {}", words.join(", "))
    }

    fn read(value: &Value) -> Result<Self, String> {
        let text = text_of(value)?;
        T::deserialize(value).map(Self).map_err(|_| quote(text))
    }
}

impl<T: JsonSchema> JsonSchema for Word<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

/// The words that the schema of an enumeration allows: `const` where a word is documented, `enum` where not.
fn collect_words(schema: &Value, words: &mut Vec<String>) {
    if let Some(word) = schema.get("const") {
        words.push(word.to_string());
    }
    for word in schema
        .get("enum")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        words.push(word.to_string());
    }
    for one in schema
        .get("oneOf")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        collect_words(one, words);
    }
}
