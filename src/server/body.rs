//! Request bodies that may not dribble.

/// The cause of an error in a request body that stopped coming.
#[derive(Debug, thiserror::Error)]
#[error("the request body stopped coming")]
pub struct Idle;
