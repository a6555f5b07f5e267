//! Nobody is let in whose header does not hold the token.

use std::sync::{Arc, LazyLock};

use axum::http::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use tokio::sync::watch;
use warmdock::access::Access;
use warmdock::config::environment::Environment;
use warmdock::config::patterns::Patterns;
use warmdock::config::secret::Secret;
use warmdock::config::{self, Anonymous, Config};
use warmdock::error::Error;

/// Short, so that it is guessed and both ways are taken.
const TOKEN: &[u8] = b"t0";

static ACCESS: LazyLock<Access> = LazyLock::new(|| {
    let mut config = Config::parse("{}", &Environment::default()).expect("the default");
    config.access.anonymous = Anonymous::None;
    config.access.tokens = vec![config::Token {
        name: "ci".into(),
        token_file: "/run/secrets/token".into(),
        secret: Secret::new(TOKEN),
        repos: Patterns::everything(),
        registries: None,
    }];
    Access::new(watch::channel(Arc::new(config)).1)
});

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Panics where it does not hold.
pub fn check(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else {
        return;
    };
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, value.clone());
    match ACCESS.principal(&headers) {
        Ok(principal) => {
            assert_eq!(principal.name(), Some("ci"));
            let end = bytes.trim_ascii().rsplit(u8::is_ascii_whitespace).next();
            let end = end.expect("a part at least");
            let is_bearer = end == TOKEN;
            let is_basic = BASE64.decode(end).is_ok_and(|pair| {
                let mut parts = pair.splitn(2, |byte| *byte == b':');
                parts.any(|part| part == TOKEN)
            });
            assert!(is_bearer || is_basic, "{value:?}");
        }
        Err(Error::Unauthorized) => {}
        Err(other) => panic!("{other}"),
    }
    headers.append(AUTHORIZATION, value);
    assert!(ACCESS.principal(&headers).is_err(), "two headers");
}
