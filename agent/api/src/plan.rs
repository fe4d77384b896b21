//! Everything a host needs, nothing it has to ask back.

use std::fmt;
use std::net::IpAddr;

use blixard_netd_api::{NetworkSpec, NicSpec};
use blixard_vmm_api::VmId;
use blixard_vmm_api::guest::Command;
use blixard_vmm_api::health::HealthCheck;
use serde::{Deserialize, Serialize};

use crate::blob::BlobRef;

/// Most VMs of one plan.
pub const VMS_MAX: usize = 10_000;
/// Smallest volume in bytes: below this an ext4 file system with a journal has no room for files.
pub const VOLUME_BYTES_MIN: u64 = 16 << 20;
/// Largest volume in bytes (16 TiB: ext4 with 4 KiB blocks).
pub const VOLUME_BYTES_MAX: u64 = 16 << 40;

/// How often the plan of a host has changed; an older one is refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

/// How often a VM has been placed; an older epoch never wins (fencing token).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// How often a VM has been asked to start. The agent runs each start once: a VM whose workload ended stays stopped until
/// the number grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Start(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Everything one node shall run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPlan {
    /// Number of this plan.
    pub generation: Generation,
    /// Networks that shall exist here.
    pub networks: Vec<NetworkSpec>,
    /// VMs that shall be here. One that is no longer listed is removed with its volume.
    pub vms: Vec<VmPlan>,
    /// Content to keep or to ask for, besides what the VMs name.
    pub blobs: Vec<BlobRef>,
}

/// One VM on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmPlan {
    /// Identity.
    pub vm: VmId,
    /// Name for people and host name of the guest, 1 to 63 letters, digits and hyphens.
    pub name: String,
    /// Which placement this is.
    pub epoch: Epoch,
    /// What it shall do.
    pub run: Run,
    /// Which start this is.
    pub start: Start,
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Guest kernel.
    pub kernel: BlobRef,
    /// Initial RAM file system with `blixard-init` and the kernel's modules.
    pub initramfs: BlobRef,
    /// Words added to the kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// Root file system image, shared read-only.
    pub image: BlobRef,
    /// File system of the image: `erofs`, `squashfs` or `ext4`.
    pub image_fs: String,
    /// The VM's own writable layer.
    pub volume: VolumePlan,
    /// Its nic, if any.
    #[serde(default)]
    pub nic: Option<NicPlan>,
    /// Name servers for the guest, at most 3.
    #[serde(default)]
    pub resolvers: Vec<IpAddr>,
    /// What it runs. Absent: a shell on the console.
    #[serde(default)]
    pub workload: Option<Command>,
    /// How it is found out whether the workload does its work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// What becomes of it when the lease of this host ends.
    #[serde(default, skip_serializing_if = "OnLeaseEnd::is_default")]
    pub on_lease_end: OnLeaseEnd,
}

/// What becomes of a VM when the lease of its host ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLeaseEnd {
    /// It runs on: nobody starts it elsewhere.
    #[default]
    RunOn,
    /// It is frozen until the lease is renewed, since it may have been started elsewhere.
    Freeze,
}

impl OnLeaseEnd {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a VM shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Run {
    /// Run, unless this start has already ended by itself.
    Running,
    /// Stop in good order: ask the guest, and end the VM after `grace_ms`.
    Stopped {
        /// Time the guest has, in milliseconds.
        grace_ms: u64,
    },
}

/// A volume that belongs to one VM and goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumePlan {
    /// Size in bytes, a multiple of 1 MiB, [`VOLUME_BYTES_MIN`] to [`VOLUME_BYTES_MAX`].
    pub size_bytes: u64,
}

/// A nic and what the guest is told about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicPlan {
    /// What netd shall make. Its network is one of the plan's.
    pub spec: NicSpec,
    /// Addresses with prefix length, as the guest configures them.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Default gateways.
    pub gateways: Vec<IpAddr>,
}
