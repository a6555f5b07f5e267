//! Tokens: how clients send them, and whose they are.
//!
//! Defences in this file:
//! - tokens are compared as SHA-256 digests in constant time against every configured token, without early exit;
//! - an empty token is never right, whatever a token file holds.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{Digest, SHA256, digest};
use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::Principal;
use crate::config::Token;

/// The tokens of one configuration.
pub(super) struct Tokens(Vec<Entry>);

struct Entry {
    digest: Digest,
    principal: Principal,
}

impl Tokens {
    /// Those of `access.tokens`.
    pub fn of(tokens: &[Token]) -> Self {
        let entry = |token: &Token| Entry {
            digest: digest(&SHA256, token.secret.expose()),
            principal: Principal::of_token(token),
        };
        Self(tokens.iter().map(entry).collect())
    }

    /// SECURITY: compares with all tokens, each in constant time; digests have one length, so none leaks.
    pub fn find(&self, token: &[u8]) -> Option<Principal> {
        let digest = digest(&SHA256, token);
        let mut found = None;
        for entry in &self.0 {
            if verify_slices_are_equal(entry.digest.as_ref(), digest.as_ref()).is_ok() {
                found = Some(entry);
            }
        }
        found.map(|entry| entry.principal.clone())
    }
}

/// Some clients leave the padding out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The token in an `Authorization` value: `Bearer <token>` (RFC 6750), or Basic (RFC 7617) with it as password of any
/// user, or as user with an empty password or `x-oauth-basic`, which is what people have in their URLs for GitHub.
pub(super) fn token(value: &[u8]) -> Option<Vec<u8>> {
    let space = value.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = (&value[..space], value[space..].trim_ascii());
    let token = if scheme.eq_ignore_ascii_case(b"bearer") {
        rest.to_vec()
    } else if scheme.eq_ignore_ascii_case(b"basic") {
        let pair = BASE64.decode(rest).ok()?;
        let colon = pair.iter().position(|byte| *byte == b':')?;
        let (user, password) = (&pair[..colon], &pair[colon + 1..]);
        if matches!(password, b"" | b"x-oauth-basic") {
            user.to_vec()
        } else {
            password.to_vec()
        }
    } else {
        return None;
    };
    // SECURITY: an empty token is never right, whatever a token file holds.
    (!token.is_empty()).then_some(token)
}

/// The token in an `Authorization` value of cargo: the bare token, or any of the forms above, which a credential
/// provider may have put into it.
pub(super) fn cargo_token(value: &[u8]) -> Option<Vec<u8>> {
    let value = value.trim_ascii();
    if value.contains(&b' ') {
        return token(value);
    }
    // SECURITY: as above.
    (!value.is_empty()).then(|| value.to_vec())
}
