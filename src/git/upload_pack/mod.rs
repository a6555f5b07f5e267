//! The server side of Git's fetch protocol, versions 0, 1 and 2. Knows neither HTTP nor SSH: a door hands over the
//! bytes of a request and gets back the bytes of the answer, and where a pack belongs into it.
//!
//! Sources: gitprotocol-v2, gitprotocol-pack, gitprotocol-capabilities, and git's upload-pack.c where these are silent.

pub mod advertise;
#[cfg(test)]
pub(crate) mod fixture;
pub mod negotiate;
pub mod pktline;
pub mod plan;
pub mod request;
pub mod shallow;
pub mod sideband;
pub mod stream;
pub mod v0;
pub mod v2;

use gix_hash::ObjectId;
use gix_object::bstr::BString;

use crate::git::objects::ObjectError;
use plan::Plan;
use request::Band;

/// The protocol version that a client asked for (`Git-Protocol`, `GIT_PROTOCOL`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Version {
    #[default]
    V0,
    V1,
    V2,
}

impl Version {
    /// Reads `version=2` and the like from a colon-separated list; what is not understood is version 0.
    pub fn from_parameters(parameters: &str) -> Self {
        let versions = parameters
            .split(':')
            .filter_map(|parameter| parameter.strip_prefix("version="));
        versions.fold(Self::V0, |best, version| match (version, best) {
            ("2", _) => Self::V2,
            ("1", Self::V0) => Self::V1,
            _ => best,
        })
    }
}

/// Why a request gets no answer. The text goes to the client as an `ERR` packet.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    Malformed(String),
    /// The phrase is what clients look for: BuildKit, for one, then fetches without the id.
    #[error("upload-pack: not our ref {0}")]
    NotOurRef(ObjectId),
    #[error("unknown ref {0}")]
    UnknownRef(BString),
    #[error("the mirror cannot be read, please try again: {0}")]
    Mirror(#[from] ObjectError),
}

impl From<pktline::PacketError> for Refusal {
    fn from(error: pktline::PacketError) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// An answer: bytes, and behind them a pack where one is due.
pub struct Response {
    pub head: Vec<u8>,
    pub pack: Option<PackResponse>,
}

/// The pack that ends a response.
pub struct PackResponse {
    pub plan: Plan,
    pub band: Band,
    /// The client reads progress texts.
    pub progress: bool,
}

impl Response {
    pub fn without_pack(head: Vec<u8>) -> Self {
        Self { head, pack: None }
    }
}

/// The `ERR` packet that tells a client why there is no answer.
pub fn error_packet(message: &str) -> Vec<u8> {
    let mut out = Vec::new();
    // A packet has an end, and a message of this length has no reader.
    let message: String = message.chars().take(1000).collect();
    pktline::write_line(&mut out, &format!("ERR {message}"));
    out
}

/// What we call ourselves in capabilities.
pub const AGENT: &str = concat!("agent=warmdock/", env!("CARGO_PKG_VERSION"));
