//! The address of something that speaks HTTP.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::Value;
use url::Url;

use super::given::{Written, kind_of};
use super::upstream_url::UpstreamUrl;

/// An `https://` or `http://` URL whose path ends in `/`, without user, query and fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpUrl(pub Url);

impl Written for HttpUrl {
    fn expected() -> String {
        "`https://host/path/` or `http://host/path/`".into()
    }

    fn read(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| kind_of(value))?;
        // As cargo writes the addresses of sparse indexes.
        let text = text.strip_prefix("sparse+").unwrap_or(text);
        let mut url = UpstreamUrl::parse(text)
            .map_err(|wrong| wrong.to_string())?
            .0;
        if !matches!(url.scheme(), "https" | "http") {
            return Err(format!("a URL of the scheme `{}`", url.scheme()));
        }
        if !url.path().ends_with('/') {
            url.set_path(&format!("{}/", url.path()));
        }
        Ok(Self(url))
    }
}

impl JsonSchema for HttpUrl {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "HttpUrl".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(sparse\\+)?https?://",
            "examples": ["https://crates.corp.example/index/"],
        })
    }
}
