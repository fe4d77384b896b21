//! VMs: what one asks for and what one sees.

use std::collections::BTreeMap;
use std::net::IpAddr;

use blixard_vmm_api::control::BootTimes;
use blixard_vmm_api::guest::WorkloadExit;
use blixard_vmm_api::{ExitReason, VmId};
use serde::{Deserialize, Serialize};

use crate::health::{Health, HealthSpec};
use crate::placement::{Placement, Restart};

/// Body of a create request. Repeating it with the same id and spec is harmless.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Identity, chosen by the client.
    pub id: VmId,
    /// Name, unique in its project. Absent: `vm-` and the last 8 characters of the id.
    #[serde(default)]
    pub name: Option<String>,
    /// What it shall be.
    pub spec: VmSpec,
}

/// What a VM shall be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Name or digest of an image of the cluster.
    pub image: String,
    /// Name of a kernel of the cluster. Absent: `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Number of vCPUs, 1 to 32.
    #[serde(default = "vcpus_default")]
    pub vcpus: u8,
    /// Memory in MiB, 32 to what the node has.
    #[serde(default = "memory_default")]
    pub memory_mib: u32,
    /// Size of the VM's writable disk in MiB, 16 to 16,777,216.
    #[serde(default = "disk_default")]
    pub disk_mib: u64,
    /// Replaces the image's entry point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command (arguments of the entry point).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Added to the image's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory, instead of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `user[:group]`, instead of the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Name of the network, or `none`. Absent: `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Words added to the kernel's command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// Labels for selection: at most 64, keys and values up to 128 characters.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What it asks of its place.
    #[serde(default, skip_serializing_if = "Placement::is_default")]
    pub placement: Placement,
    /// What happens when it ends although it shall run.
    #[serde(default, skip_serializing_if = "Restart::is_default")]
    pub restart: Restart,
    /// How it is found out whether it does its work; absent: as its image says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthSpec>,
}

fn vcpus_default() -> u8 {
    1
}

fn memory_default() -> u32 {
    256
}

fn disk_default() -> u64 {
    1024
}

/// Body of a stop request; it may be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopVm {
    /// Time that the guest has to end in good order, in milliseconds; 0 ends it at once.
    #[serde(default = "grace_default")]
    pub grace_ms: u64,
}

/// Grace time of a stop request that names none, in milliseconds (as docker).
pub fn grace_default() -> u64 {
    10_000
}

impl Default for StopVm {
    fn default() -> Self {
        Self { grace_ms: grace_default() }
    }
}

/// A VM as it is seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmView {
    /// Identity.
    pub id: VmId,
    /// Name.
    pub name: String,
    /// Its project.
    pub project: String,
    /// What it shall be.
    pub spec: VmSpec,
    /// How often what it shall be or do has changed (for `If-Match`).
    pub generation: u64,
    /// When it was created, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// What it shall do.
    pub desired: Desired,
    /// Where it is in its life.
    pub phase: Phase,
    /// Why it is there, when there is something to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Name of the node it is placed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How often it has been placed.
    pub epoch: u64,
    /// How often it has been asked to start.
    pub start: u64,
    /// Digest of the image it was made from.
    pub image_digest: String,
    /// Its addresses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// When the newest start began, in milliseconds of Unix time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at_ms: Option<u64>,
    /// When the newest start ended, in milliseconds of Unix time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<u64>,
    /// Why its VMM ended, when the newest start has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitReason>,
    /// How its workload ended, when it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<WorkloadExit>,
    /// How it is, when there is a check and it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// Where the time of the newest start went, when known to this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timing: Option<Timing>,
    /// Memory charged to it in bytes, when known to this node; as old as `observed_age_ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Age of what its node last told of it, in milliseconds, when known to this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_age_ms: Option<u64>,
}

/// What a VM shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// Run.
    Running,
    /// Be there and not run.
    Stopped,
    /// Be gone.
    Gone,
}

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Accepted; its node has not begun.
    Pending,
    /// Content, volume, nic are being made.
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
    /// It has ended; it can be started.
    Stopped,
    /// It could not be started, or ended by a fault.
    Failed,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pending => "pending",
            Self::Preparing => "preparing",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        })
    }
}

/// Where the time of a start went: moments in microseconds of the node's CLOCK_MONOTONIC, and the agent's steps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// The API had read the request.
    #[serde(default)]
    pub request_us: Option<u64>,
    /// The command was applied to the replicated state.
    #[serde(default)]
    pub applied_us: Option<u64>,
    /// The plan went to the agent.
    #[serde(default)]
    pub planned_us: Option<u64>,
    /// The agent's steps: name, begin, end.
    #[serde(default)]
    pub steps: Vec<(String, u64, u64)>,
    /// What the VMM saw.
    #[serde(default)]
    pub boot: BootTimes,
}
