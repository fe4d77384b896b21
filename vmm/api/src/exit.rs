//! Why a VM ended: as a value, and as the exit code of its VMM process.

use serde::{Deserialize, Serialize};

use crate::guest::WorkloadExit;
use crate::id::VmId;
use crate::stats::FlightEvent;

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset (reboot).
    Reset,
    /// A `Kill` request or SIGTERM.
    Killed,
    /// The guest did what no processor survives (a triple fault, or a state that KVM cannot enter).
    GuestFault {
        /// What KVM reported.
        detail: String,
    },
    /// The configuration or an image was refused before the guest ran.
    BadConfig {
        /// The field or image, and what is wrong.
        detail: String,
    },
    /// The host lacks something: `/dev/kvm`, a capability, memory.
    HostProblem {
        /// What, and the system's answer.
        detail: String,
    },
    /// The VMM made a system call that its sandbox forbids: a fault of it, or somebody has taken it over.
    Forbidden {
        /// Number of the call.
        call: u32,
    },
    /// A fault of the VMM itself.
    Internal {
        /// What happened.
        detail: String,
    },
}

impl ExitReason {
    /// Somebody or something failed, so that the last events are of interest.
    pub fn is_abnormal(&self) -> bool {
        !matches!(self, Self::PowerOff | Self::Reset | Self::Killed)
    }

    /// The exit code of the VMM process for this reason.
    pub fn code(&self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::BadConfig { .. } => 2,
            Self::HostProblem { .. } => 3,
            Self::Internal { .. } => 4,
            Self::GuestFault { .. } => 5,
            Self::Reset => 6,
            Self::Killed => 7,
            Self::Forbidden { .. } => 8,
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Killed => f.write_str("killed on request"),
            Self::GuestFault { detail } => write!(f, "the guest stopped with a fault: {detail}"),
            Self::BadConfig { detail } => write!(f, "refused: {detail}"),
            Self::HostProblem { detail } => write!(f, "the host cannot do it: {detail}"),
            Self::Forbidden { call } => write!(f, "it made the forbidden system call {call}"),
            Self::Internal { detail } => write!(f, "internal error: {detail}"),
        }
    }
}

/// What a VMM leaves behind in its exit-record file, for an agent that was not there when it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Identity, as configured.
    pub vm: VmId,
    /// Why it ended.
    pub reason: ExitReason,
    /// How the workload ended, when the guest told.
    #[serde(default)]
    pub workload: Option<WorkloadExit>,
    /// What the guest's init said went wrong.
    #[serde(default)]
    pub guest_problem: Option<String>,
    /// The last events before an end that nobody asked for, oldest first, at most [`EVENTS_MAX`](crate::stats::EVENTS_MAX)
    /// and one per device that had failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<FlightEvent>,
}
