//! Why a change was not made, and how it is told to the agent.

use std::error::Error;

use blixard_netd_api::{Problem, ProblemKind};

use crate::link::LinkError;
use crate::nft::NftError;
use crate::sysctl::SysctlError;
use crate::tap::TapError;

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The network does not exist.
    #[error("the network {0} does not exist on this node")]
    NoNetwork(String),
    /// The network has not all its addresses.
    #[error("the network {0} has lost an address; ensure the network first")]
    Damaged(String),
    /// Interfaces are attached to the network.
    #[error("the network {network} is used by {count} interfaces, among them {example}")]
    InUse {
        /// Its name.
        network: String,
        /// How many.
        count: usize,
        /// Name of one of them.
        example: String,
    },
    /// Something else is there.
    #[error("{0}")]
    Conflict(String),
    /// Interfaces or addresses.
    #[error("the interfaces of this host cannot be brought into shape")]
    Link(#[from] LinkError),
    /// Packet filter.
    #[error("the packet filter of this host cannot be brought into shape")]
    Nft(#[from] NftError),
    /// Kernel switches.
    #[error("a network switch of the kernel is not as needed")]
    Sysctl(#[from] SysctlError),
    /// TAP.
    #[error("the TAP cannot be opened")]
    Tap(#[from] TapError),
}

impl ChangeError {
    /// True when the connection to the kernel is of no use any more.
    pub fn is_lost_connection(&self) -> bool {
        matches!(self, Self::Link(LinkError::NoAnswer { .. }))
    }

    fn kind(&self) -> ProblemKind {
        match self {
            Self::Invalid(_) => ProblemKind::Invalid,
            Self::NoNetwork(_) => ProblemKind::NoNetwork,
            Self::InUse { .. } | Self::Tap(TapError::Busy(_)) => ProblemKind::Busy,
            Self::Conflict(_) | Self::Tap(TapError::Other(_)) => ProblemKind::Conflict,
            Self::Damaged(_) | Self::Link(_) | Self::Nft(_) | Self::Sysctl(_) | Self::Tap(_) => {
                ProblemKind::Kernel
            }
        }
    }
}

impl From<ChangeError> for Problem {
    fn from(error: ChangeError) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            message.push_str(": ");
            message.push_str(&inner.to_string());
            cause = inner.source();
        }
        Self { kind: error.kind(), message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_tells_the_whole_chain_and_its_kind() {
        let cause = std::io::Error::from_raw_os_error(nix::libc::EPERM);
        let refused = LinkError::Refused { operation: "make the bridge bx-a".into(), source: cause };
        let problem = Problem::from(ChangeError::from(refused));
        assert_eq!(problem.kind, ProblemKind::Kernel);
        assert!(
            problem.message.contains("cannot make the bridge bx-a: Operation not permitted"),
            "{problem}"
        );
        let busy = Problem::from(ChangeError::from(TapError::Busy("bxv0123456789-0".into())));
        assert_eq!(busy.kind, ProblemKind::Busy);
    }
}
