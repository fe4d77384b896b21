//! The parts of records that placement and failure handling add to nodes and VMs, and the changes that they propose.

use blixard_api::placement::Arch;
pub use blixard_api::placement::NodePolicy;
use serde::{Deserialize, Serialize};

use super::records::NodeId;

/// What a node offers, and whether it answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeOffer {
    /// What the operator says about it.
    pub policy: NodePolicy,
    /// What it has, once it has told.
    pub capacity: Option<Capacity>,
    /// Its VMs are being moved away, each with this time to end in good order, in milliseconds.
    pub drain_grace_ms: Option<u64>,
    /// Whether it answers.
    pub status: NodeStatus,
    /// Revision of the suspicion that is the present one, while it does not answer.
    pub suspicion: u64,
    /// When it was declared down last, in milliseconds of Unix time.
    pub down_at_ms: u64,
    /// Revision at which it was declared down last; 0 when that was never, or below feature level 4.
    #[serde(skip_serializing_if = "is_zero")]
    pub down_revision: u64,
    /// Its agent freezes restartable VMs when its lease ends. Only then may they be started elsewhere without asking it.
    pub leased: bool,
    /// It is down because an operator said so, and vouches that nothing runs there any more.
    pub vouched: bool,
}

impl NodeOffer {
    /// True when nothing was said of the node.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a node has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk for volumes in MiB.
    pub disk_mib: u64,
    /// Processor architecture.
    #[serde(default)]
    pub arch: Arch,
}

/// Whether a node answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeStatus {
    /// It does.
    #[default]
    Up,
    /// It may not: since this is applied, no voter renews its lease.
    Suspected,
    /// It does not, and its lease has ended.
    Down,
}

/// What becomes of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeChange {
    /// The operator says this about it.
    Policy(Box<NodePolicy>),
    /// It tells what it has.
    Capacity(Capacity),
    /// It takes no new VMs, and those that may go elsewhere are moved.
    Drain {
        /// Time that each VM has to end in good order, in milliseconds.
        grace_ms: u64,
    },
    /// No voter renews its lease from now on. Without effect when it is down.
    Suspect,
    /// It answers. Legal always; a node that was down is up again.
    Clear,
    /// Its lease has ended for certain. Legal while it is suspected by this very suspicion, and refused when too many nodes
    /// were declared down just before.
    Down {
        /// Revision of the suspicion that the voters were asked about.
        suspicion: u64,
        /// Nodes that were declared down up to this revision were so more than a minute ago. Absent below feature level 4:
        /// then the proposers' clocks are compared.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        settled: Option<u64>,
    },
    /// An operator says that nothing runs there any more: as many as there are, without a suspicion before, and whether or
    /// not leases were enforced.
    ForceDown,
    /// Whether its agent enforces leases.
    Leased(bool),
}

/// What happened to a VM besides what users ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Upkeep {
    /// It leaves its node and is then placed anew.
    pub leaving: Option<Leaving>,
    /// How often in a row it was started again by itself.
    pub restarts: u32,
    /// Nodes that refused it, or where it did not become healthy.
    pub avoid: Vec<NodeId>,
    /// How often it was started again on its present node without having become healthy since.
    #[serde(skip_serializing_if = "is_zero")]
    pub unhealthy_starts: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Upkeep {
    /// True when nothing happened.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A VM that leaves its node: it is stopped, taken off the plan, and placed anew once its node has confirmed that nothing
/// of it is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Why.
    pub why: Departure,
    /// Time that the guest has, in milliseconds.
    pub grace_ms: u64,
    /// Its node has confirmed: it may be placed.
    #[serde(default)]
    pub released: bool,
}

/// Why a VM leaves its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Departure {
    /// The node is drained.
    Drained,
    /// A VM of higher priority needs its room.
    Preempted,
    /// The node refused it.
    Refused,
    /// It waits for its first node.
    Waiting,
    /// It did not become healthy there.
    Unhealthy,
}

/// What is done with a VM besides what users ask for. Legal for the present placement only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmChange {
    /// It leaves its node. Without effect when it does already, does not run, or waits for its node.
    Evict {
        /// Why.
        why: Departure,
        /// Time that the guest has, in milliseconds.
        grace_ms: u64,
    },
    /// Its node refuses to run it: it leaves without a stop, and does not come back there. Without effect when this start is
    /// not the newest, or when no other node is left to try.
    Refused {
        /// The start that failed.
        start: u64,
    },
    /// Its node confirmed that nothing of it is left. Legal when it leaves and is off the plan.
    Released,
    /// It is placed on this node. Legal when it was released, or when its node is down and its lease was enforced there.
    Place {
        /// The node.
        node: NodeId,
    },
    /// It has ended and is started again by its restart policy. Without effect when this start is not the newest.
    Restart {
        /// The start that has ended.
        start: u64,
    },
    /// It is unhealthy and is started again by its restart policy. Without effect when this start is not the newest.
    Unhealthy {
        /// The start that is unhealthy.
        start: u64,
    },
}
