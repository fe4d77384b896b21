//! The records that the replicated state is made of. They are stored as JSON: a field is only added, and with a default.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use blixard_agent_api::{BlobRef, Digest};
use blixard_api::VmId;
use blixard_api::image::ImageConfig;
use blixard_api::vm::{Desired, Phase, VmSpec};
use blixard_netd_api::Subnet;
use blixard_vmm_api::ExitReason;
use blixard_vmm_api::config::MacAddr;
use blixard_vmm_api::guest::{Command as Workload, WorkloadExit};
use blixard_vmm_api::health::{Health, HealthCheck};
use serde::{Deserialize, Serialize};

use super::member::NodeFacts;
pub use super::member::{Authority, TrustRecord};
use super::placement::{NodeOffer, Upkeep};

/// Number of a node for its whole life; never given twice.
pub type NodeId = u64;

/// The cluster as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// What every member understands; grows when an operator says so.
    pub feature_level: u32,
    /// When the cluster was made, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// Added to revisions to make generations of plans: a cluster that is made anew on the same hosts begins above the
    /// old one, so that agents do not take its plans for old ones.
    pub plan_base: u64,
    /// Number of the next node: numbers are never given twice.
    #[serde(default = "second")]
    pub next_node: NodeId,
    /// How long a lease lasts, in milliseconds. The same for all nodes and for ever: whoever gave one and whoever waits for its end
    /// must mean the same.
    #[serde(default = "default_lease_ms", skip_serializing_if = "is_default_lease")]
    pub lease_ms: u64,
}

/// How long a lease lasts in milliseconds, unless whoever makes the cluster says otherwise.
pub const LEASE_MS: u64 = 5_000;
/// How long it may last. Heartbeats, which renew it, come every half second; agents take it for a mistake above ten minutes.
pub const LEASES_MS: std::ops::RangeInclusive<u64> = 5_000..=300_000;

/// The lease of clusters that were made before there was a choice.
pub(super) fn default_lease_ms() -> u64 {
    LEASE_MS
}

/// Left out then, as older programs write it.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
pub(super) fn is_default_lease(lease_ms: &u64) -> bool {
    *lease_ms == LEASE_MS
}

/// The next node of a cluster that was made when clusters had one.
fn second() -> NodeId {
    2
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Number.
    pub id: NodeId,
    /// Name for people.
    pub name: String,
    /// Generation of its newest plan.
    pub plan_generation: u64,
    /// Where other nodes and users reach it, if they can.
    #[serde(default)]
    pub address: Option<SocketAddr>,
    /// Its public key (Ed25519), hexadecimal.
    #[serde(default)]
    pub public_key: Option<String>,
    /// Where it stands: `zone`, `rack` and whatever else is told apart.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Version of its program.
    #[serde(default)]
    pub version: String,
    /// Highest feature level that its program knows.
    #[serde(default = "first_level")]
    pub feature_level: u32,
    /// Version of the trust that its certificate follows.
    #[serde(default)]
    pub trust_version: u64,
    /// It gets no new VMs.
    #[serde(default)]
    pub cordoned: bool,
    /// Digest of the join token that it came with.
    #[serde(default)]
    pub joined_with: Option<String>,
    /// When it joined, in milliseconds of Unix time.
    #[serde(default)]
    pub joined_at_ms: u64,
    /// As that of the cluster, when this is higher: generations of this node's plans begin above what its agent may know from
    /// a cluster that the node left.
    #[serde(default)]
    pub plan_base: u64,
    /// What it offers, and whether it answers.
    #[serde(default, skip_serializing_if = "NodeOffer::is_default")]
    pub offer: NodeOffer,
}

/// What programs knew that did not say what they know.
fn first_level() -> u32 {
    1
}

impl NodeRecord {
    /// A node of which nothing but this is known.
    pub fn new(id: NodeId, name: &str) -> Self {
        Self {
            id,
            name: name.to_owned(),
            plan_generation: 0,
            address: None,
            public_key: None,
            labels: BTreeMap::new(),
            version: String::new(),
            feature_level: first_level(),
            trust_version: 0,
            cordoned: false,
            joined_with: None,
            joined_at_ms: 0,
            plan_base: 0,
            offer: NodeOffer::default(),
        }
    }

    /// Takes over what the node says about itself.
    pub fn learn(&mut self, facts: &NodeFacts) {
        self.name.clone_from(&facts.name);
        self.address = facts.address;
        self.public_key.clone_from(&facts.public_key);
        self.labels.clone_from(&facts.labels);
        self.version.clone_from(&facts.version);
        self.feature_level = facts.feature_level;
        self.trust_version = facts.trust_version;
    }

    /// What it said about itself last.
    pub fn facts(&self) -> NodeFacts {
        NodeFacts {
            name: self.name.clone(),
            address: self.address,
            public_key: self.public_key.clone(),
            labels: self.labels.clone(),
            version: self.version.clone(),
            feature_level: self.feature_level,
            trust_version: self.trust_version,
        }
    }
}

/// A network with its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Name.
    pub name: String,
    /// Gateway and prefix of IPv4.
    pub v4: Subnet,
    /// Gateway and prefix of IPv6.
    pub v6: Subnet,
    /// Let the nics reach what the node reaches.
    pub nat: bool,
    /// Largest packet in bytes.
    pub mtu: u16,
    /// Host number after the one given last: numbers are given in order, so that one is reused as late as possible.
    pub next_host: u32,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Name.
    pub name: String,
    /// The file system image.
    pub blob: BlobRef,
    /// File system: `erofs`.
    pub fs: String,
    /// When it was imported, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// What to run from it.
    pub config: ImageConfig,
}

/// A guest kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRecord {
    /// Name.
    pub name: String,
    /// Release, as `uname -r` prints it.
    pub release: String,
    /// The kernel.
    pub kernel: BlobRef,
    /// The initramfs with `blixard-init` and the modules.
    pub initramfs: BlobRef,
    /// Modules in the initramfs.
    pub modules: Vec<String>,
    /// When it was imported, in milliseconds of Unix time.
    pub created_at_ms: u64,
}

/// What a VM was made from; stays when names point elsewhere later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pins {
    /// Root file system image.
    pub image: BlobRef,
    /// File system of the image.
    pub image_fs: String,
    /// Kernel.
    pub kernel: BlobRef,
    /// Initramfs.
    pub initramfs: BlobRef,
}

/// A VM's attachment to a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicRecord {
    /// Name of the network.
    pub network: String,
    /// Its number in the network: the host part of its addresses.
    pub host: u32,
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address.
    pub v6: Ipv6Addr,
}

impl NicRecord {
    /// The addresses, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        vec![self.v4.into(), self.v6.into()]
    }

    /// Hardware address: locally administered, made of the host number, so that it is unique in its network and an
    /// address that is given again comes with the same hardware address (neighbours' caches stay right).
    pub fn mac(&self) -> MacAddr {
        let [a, b, c, d] = self.host.to_be_bytes();
        MacAddr([0x02, 0x62, a, b, c, d])
    }
}

/// What a node told about a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Start that it is about; 0 before the first was begun.
    pub start: u64,
    /// Phase.
    pub phase: Phase,
    /// Why it is there.
    #[serde(default)]
    pub reason: Option<String>,
    /// The guest reported ready.
    #[serde(default)]
    pub guest_ready: bool,
    /// When the start began, in milliseconds of Unix time.
    #[serde(default)]
    pub started_at_ms: Option<u64>,
    /// When it ended, in milliseconds of Unix time.
    #[serde(default)]
    pub ended_at_ms: Option<u64>,
    /// Why the VMM ended.
    #[serde(default)]
    pub exit: Option<ExitReason>,
    /// How the workload ended.
    #[serde(default)]
    pub workload: Option<WorkloadExit>,
    /// How the workload is, when it runs and is looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
}

impl Observed {
    /// Nothing has been told about this start yet.
    pub fn nothing(start: u64) -> Self {
        Self {
            start,
            phase: Phase::Pending,
            reason: None,
            guest_ready: false,
            started_at_ms: None,
            ended_at_ms: None,
            exit: None,
            workload: None,
            health: None,
        }
    }
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Identity.
    pub id: VmId,
    /// Its project.
    pub project: String,
    /// Name, unique in the project.
    pub name: String,
    /// What was asked for.
    pub spec: VmSpec,
    /// What it was made from.
    pub pins: Pins,
    /// What it runs: the image's words and the spec's, merged. Absent: a shell on the console.
    #[serde(default)]
    pub workload: Option<Workload>,
    /// How it is found out whether that does its work: the image's words and the spec's, merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// Its nic, when it has one.
    #[serde(default)]
    pub nic: Option<NicRecord>,
    /// How often what it shall be or do has changed.
    pub generation: u64,
    /// When it was created, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// What it shall do.
    pub desired: Desired,
    /// Time for a stop in good order, in milliseconds.
    pub grace_ms: u64,
    /// How often it has been asked to start.
    pub start: u64,
    /// Where it is placed.
    pub node: NodeId,
    /// How often it has been placed.
    pub epoch: u64,
    /// Generation of the node's plan since which it is no longer listed there; 0 while it is.
    #[serde(default)]
    pub unlisted_since: u64,
    /// What its node told last that is worth keeping.
    pub observed: Observed,
    /// Whether it is moved, and how often it had to be started again.
    #[serde(default, skip_serializing_if = "Upkeep::is_default")]
    pub upkeep: Upkeep,
}

impl VmRecord {
    /// The newest start has come to its end, or the VM was stopped before it began.
    pub fn has_ended(&self) -> bool {
        matches!(self.observed.phase, Phase::Stopped | Phase::Failed)
    }

    /// True when what a node tells is about the present. What it tells about an older start is old news: the end of start
    /// 1 must not look like the end of start 2. Before the newest start was begun only preparations and their failure are
    /// news, and the end of what shall not run anyway.
    pub fn is_news(&self, observed: &Observed) -> bool {
        let preparing = matches!(observed.phase, Phase::Pending | Phase::Preparing);
        let leaves = self.upkeep.leaving.is_some();
        let failed_before = observed.start == 0 && observed.phase == Phase::Failed;
        observed.start >= self.start
            || preparing
            || failed_before
            || self.desired != Desired::Running
            || leaves
    }

    /// The content that it needs.
    pub fn blobs(&self) -> [BlobRef; 3] {
        [self.pins.image, self.pins.kernel, self.pins.initramfs]
    }
}

/// The answer of a mutation that came with an idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptAnswer {
    /// The key.
    pub key: String,
    /// What was asked, as a digest: the same key with another request is an error of the client.
    pub fingerprint: Digest,
    /// When it was answered, in milliseconds of Unix time.
    pub at_ms: u64,
    /// Revision at which it was answered.
    pub revision: u64,
    /// The answer.
    pub answer: super::command::Answer,
}

/// Labels match when each of `wanted` is there with its value.
pub fn labels_match(labels: &BTreeMap<String, String>, wanted: &[(String, String)]) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
