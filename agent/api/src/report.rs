//! What a host does run.

use blixard_vmm_api::control::BootTimes;
use blixard_vmm_api::guest::WorkloadExit;
use blixard_vmm_api::health::Health;
use blixard_vmm_api::{ExitReason, VmId};
use serde::{Deserialize, Serialize};

use crate::blob::BlobRef;
use crate::plan::{Epoch, Generation, Start};

/// What one node does run, as far as its agent knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Grows with every change of this report; starts anew when the agent starts.
    pub revision: u64,
    /// Which start of the agent this is: a random number.
    pub agent_instance: u64,
    /// The stored plan.
    pub generation: Generation,
    /// VMs that are here, planned or still being removed, in order of id.
    pub vms: Vec<VmReport>,
    /// Content that is needed and not here: the node is asked to send it.
    pub missing: Vec<BlobRef>,
    /// Content that is here.
    pub blobs: Vec<BlobRef>,
    /// What the host has.
    pub capacity: Capacity,
    /// What is wrong with the host as a whole (netd unreachable, disk full), one sentence each.
    #[serde(default)]
    pub problems: Vec<String>,
    /// It has a lease and enforces it, whether or not it has ended.
    #[serde(default)]
    pub leased: bool,
}

/// What a host has for VMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Space for volumes and content in bytes, as the file system says: in all.
    pub disk_bytes: u64,
    /// The same: free.
    pub disk_free_bytes: u64,
}

/// One VM as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// Identity.
    pub vm: VmId,
    /// Placement it belongs to.
    pub epoch: Epoch,
    /// Newest start that was begun; 0 before the first.
    pub start: Start,
    /// Where it is in its life.
    pub phase: Phase,
    /// Why it is there: what it waits for, or what failed. One sentence for people.
    #[serde(default)]
    pub reason: Option<String>,
    /// The guest reported ready in this start.
    #[serde(default)]
    pub guest_ready: bool,
    /// Process id of its VMM, while there is one.
    #[serde(default)]
    pub vmm_pid: Option<i32>,
    /// When this start began, in milliseconds of Unix time.
    #[serde(default)]
    pub started_at_ms: Option<u64>,
    /// When this start ended, in milliseconds of Unix time.
    #[serde(default)]
    pub ended_at_ms: Option<u64>,
    /// Why the VMM ended, when this start has ended.
    #[serde(default)]
    pub exit: Option<ExitReason>,
    /// How the workload ended, when it has.
    #[serde(default)]
    pub workload: Option<WorkloadExit>,
    /// How the workload is, while the VMM runs and when its guest was told to look. It changes once a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// When the VMM reached what, in microseconds of the host's CLOCK_MONOTONIC.
    #[serde(default)]
    pub boot: BootTimes,
    /// How long the agent's steps of this start took.
    #[serde(default)]
    pub steps: Vec<StepTime>,
    /// Memory charged to the VM's cgroup in bytes, when known.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// This start has failed because of the host, not the VM: another host may do better.
    #[serde(default)]
    pub refused: bool,
}

impl VmReport {
    /// A VM in this placement of which nothing has begun.
    pub fn pending(vm: VmId, epoch: Epoch) -> Self {
        Self {
            vm,
            epoch,
            start: Start(0),
            phase: Phase::Pending,
            reason: None,
            guest_ready: false,
            vmm_pid: None,
            started_at_ms: None,
            ended_at_ms: None,
            exit: None,
            workload: None,
            health: None,
            boot: BootTimes::default(),
            steps: Vec::new(),
            memory_bytes: None,
            refused: false,
        }
    }
}

/// Where a VM is in its life, as far as one host knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Known, nothing done yet.
    Pending,
    /// Content, volume, nic, cgroup are being made; `reason` says what is waited for.
    Preparing,
    /// The VMM runs, the guest is not ready.
    Starting,
    /// The guest is ready.
    Running,
    /// Its vCPUs are stopped and will go on.
    Paused,
    /// Its state is on disk.
    Suspended,
    /// It was asked to end.
    Stopping,
    /// It has ended, or was never started; it can be started.
    Stopped,
    /// It could not be started or ended by a fault; `reason` says which.
    Failed,
}

/// How long one step took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTime {
    /// Name of the step, for example `volume`.
    pub step: String,
    /// Begin in microseconds of CLOCK_MONOTONIC.
    pub begin_us: u64,
    /// End in microseconds of CLOCK_MONOTONIC.
    pub end_us: u64,
}
