//! Requests and replies: one message each, on a connection to `netd.sock`.

use serde::{Deserialize, Serialize};

use crate::spec::{NetworkSpec, NicId, NicSpec};

/// What the agent may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Make or repair a network. Answers [`Reply::Done`].
    EnsureNetwork(NetworkSpec),
    /// Remove a network that has no nics. Answers [`Reply::Done`].
    RemoveNetwork {
        /// Its name.
        name: String,
    },
    /// Make or repair a nic of an existing network. Answers [`Reply::Done`], or with `open` [`Reply::Tap`] and one descriptor.
    EnsureNic {
        /// What it shall be.
        spec: NicSpec,
        /// Open its TAP: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, header of 12 bytes, non-blocking. Refused as
        /// [`ProblemKind::Busy`] while another process has it open.
        open: bool,
    },
    /// Remove a nic. Answers [`Reply::Done`].
    RemoveNic {
        /// Which.
        id: NicId,
    },
    /// What there is. Answers [`Reply::Inventory`].
    List,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is so now.
    Done,
    /// The TAP's descriptor comes with this message.
    Tap,
    /// What there is.
    Inventory(Inventory),
    /// Not done.
    Refused(Problem),
}

/// What exists on this node under our prefix, read from the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Names of networks (bridges without their prefix).
    pub networks: Vec<String>,
    /// Nics, with the network they are attached to, if any.
    pub nics: Vec<(NicId, Option<String>)>,
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// Kind, for programs.
    pub kind: ProblemKind,
    /// What happened and why, for people.
    pub message: String,
}

/// Kinds of problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// The request itself is wrong; repeating it does not help.
    Invalid,
    /// The network does not exist.
    NoNetwork,
    /// In use by somebody: a TAP by a VMM, a network by its nics.
    Busy,
    /// The subnet or name collides with something on the host that is not ours.
    Conflict,
    /// The kernel refused; repeating may help.
    Kernel,
}
