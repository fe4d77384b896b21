//! What can go wrong between a client and a node.

use std::io;
use std::time::Duration;

use super::host::{Host, NotAHost};
use crate::ApiError;

/// A request that got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address of the node is none.
    #[error(transparent)]
    NotAHost(#[from] NotAHost),
    /// No connection to the node.
    #[error("cannot connect to the node at {host}")]
    Connect {
        /// Where.
        host: Host,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection broke, or what came was not HTTP.
    #[error("the connection to the node at {host} broke")]
    Broken {
        /// Where.
        host: Host,
        /// How.
        source: hyper::Error,
    },
    /// The node did not answer in time.
    #[error("the node at {host} did not answer within {} s", time.as_secs())]
    NoAnswer {
        /// Where.
        host: Host,
        /// How long it was waited for.
        time: Duration,
    },
    /// The node refused.
    #[error(transparent)]
    Refused(Box<Refusal>),
    /// The answer is not one of this API.
    #[error("the answer of {host} is not one of this API: {what}")]
    Foreign {
        /// Where.
        host: Host,
        /// What came.
        what: String,
    },
    /// The answer cannot be read.
    #[error("the answer of the node at {host} cannot be read")]
    Unreadable {
        /// Where.
        host: Host,
        /// Why.
        source: serde_json::Error,
    },
    /// The answer or a line of it is longer than it may be.
    #[error("the answer of the node at {host} is longer than {limit} bytes")]
    TooLong {
        /// Where.
        host: Host,
        /// The limit in bytes.
        limit: usize,
    },
    /// A request of this form cannot be made.
    #[error("the request cannot be written: {0}")]
    BadRequest(String),
    /// The operating system gave no random bytes.
    #[error("no random bytes")]
    Random(#[source] io::Error),
}

/// A refusal of the node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// What the node says.
    pub error: ApiError,
}

impl ClientError {
    /// The refusal, when the node refused.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// HTTP status of the refusal, when the node refused.
    pub fn status(&self) -> Option<u16> {
        self.refusal().map(|r| r.status)
    }

    /// What to try.
    pub fn suggestion(&self) -> Option<String> {
        match self {
            Self::Refused(refusal) => refusal.error.suggestion.clone(),
            Self::NotAHost(_) => Some("give --host or BLIXARD_HOST as unix:///run/blixard/node.sock".into()),
            Self::Connect { host, source } => Some(host.advice(source)),
            Self::Broken { .. } | Self::NoAnswer { .. } => Some(
                "look at the node's log, then try again: `blixard doctor` shows whether it serves".into(),
            ),
            Self::Foreign { .. } | Self::Unreadable { .. } | Self::TooLong { .. } => Some(
                "is this the address of a blixard-node, and of the same version? see `blixard version`"
                    .into(),
            ),
            Self::BadRequest(_) | Self::Random(_) => None,
        }
    }

    /// Trying the same again may help.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Refused(refusal) => refusal.error.retryable,
            Self::Connect { .. } | Self::Broken { .. } | Self::NoAnswer { .. } => true,
            _ => false,
        }
    }
}
