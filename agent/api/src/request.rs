//! Requests and replies: one message each, on a connection to `agent.sock`.

use blixard_vmm_api::VmId;
use blixard_vmm_api::stats::Sample;
use serde::{Deserialize, Serialize};

use crate::blob::BlobRef;
use crate::plan::{Generation, HostPlan};
use crate::report::HostReport;

/// Longest time that [`Request::Observe`] waits, in milliseconds.
pub const OBSERVE_WAIT_MS_MAX: u64 = 60_000;

/// What the node may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Store this plan and work toward it. Answers [`Reply::Report`] at once.
    Apply(HostPlan),
    /// Answers [`Reply::Report`] as soon as it is newer than (`agent_instance`, `revision`), or after `wait_ms`.
    Observe {
        /// From the newest report seen, 0 for none.
        agent_instance: u64,
        /// From the newest report seen.
        revision: u64,
        /// Longest wait, at most [`OBSERVE_WAIT_MS_MAX`].
        wait_ms: u64,
    },
    /// VMs with [`OnLeaseEnd::Freeze`](crate::plan::OnLeaseEnd) may run until this moment. Refused with
    /// [`ProblemKind::NotNow`] while the stored plan is older than `generation`. Answers [`Reply::Done`].
    Renew {
        /// In milliseconds of CLOCK_BOOTTIME, which node and agent share; a moment before the present one changes nothing.
        /// Absent: there are no leases any more.
        until_ms: Option<u64>,
        /// Oldest plan that this is about.
        generation: Generation,
    },
    /// Keep the content of the passed descriptor (a readable regular file). It is copied, hashed and refused when it is
    /// not what it should be. Answers [`Reply::Done`].
    PutBlob(BlobRef),
    /// Open a stream to the exec port of a guest. Answers [`Reply::Stream`] with one connected stream socket.
    OpenExec {
        /// Which VM; it must be ready.
        vm: VmId,
    },
    /// Open the console of a VM. Answers [`Reply::Stream`] with one connected stream socket.
    OpenConsole {
        /// Which VM; its VMM must run.
        vm: VmId,
    },
    /// Open the console log of a VM for reading. Answers [`Reply::Stream`] with a read-only file.
    OpenLog {
        /// Which VM.
        vm: VmId,
    },
    /// Ask the VMM of a VM what it counts. Answers [`Reply::Metrics`].
    Metrics {
        /// Which VM; its VMM must run.
        vm: VmId,
    },
    /// Look at the host. Answers [`Reply::Findings`].
    Doctor,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is so now.
    Done,
    /// How the host is.
    Report(Box<HostReport>),
    /// The descriptor comes with this message.
    Stream,
    /// What a VMM counts.
    Metrics(Vec<Sample>),
    /// What was looked at.
    Findings(Vec<Finding>),
    /// Not done.
    Refused(Problem),
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
    /// An older plan than the stored one.
    Stale,
    /// No such VM here.
    NotFound,
    /// The VM is not in a phase in which this is possible.
    NotNow,
    /// The host refused; repeating may help.
    Host,
}

/// One thing that was looked at on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, for example `cgroup v2`.
    pub check: String,
    /// How it is.
    pub state: FindingState,
    /// What was found.
    pub found: String,
    /// What to do about it, when something is to be done.
    #[serde(default)]
    pub fix: Option<String>,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingState {
    /// Good.
    Ok,
    /// Works, with less.
    Warning,
    /// VMs cannot run like this.
    Bad,
}
