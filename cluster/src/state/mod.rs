//! The replicated state: records by key, and indexes that are derived from them.
//!
//! [`State::apply`] is the only way to change it. It is total (it answers or refuses, and never fails half way), and it
//! depends on nothing but the state and the command: no clock, no randomness, no I/O. Every replica that has applied the
//! same commands holds the same records.
//!
//! Each change notes the key of its record; whoever stores the state takes the noted keys ([`State::take_changed`]) and
//! writes those records. [`State::from_records`] is the way back.

pub mod address;
pub mod apply;
pub mod apply_health;
pub mod apply_member;
pub mod apply_node;
mod apply_place;
pub mod command;
pub mod invariants;
#[cfg(test)]
mod join_model_test;
pub mod member;
pub mod placement;
pub mod records;
#[cfg(test)]
pub mod testing;
pub mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use blixard_api::VmId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::scheduler::View;

pub use command::{Answer, Command, Key, Outcome, Proposal, Refusal};
pub use member::{ApiTokenRecord, JoinTokenRecord, MemberCommand, NodeFacts, TrustRecord};
pub use placement::{Capacity, Departure, Leaving, NodeOffer, NodePolicy, NodeStatus, Upkeep};
pub use records::{
    ClusterRecord, ImageRecord, KeptAnswer, KernelRecord, NetworkRecord, NicRecord, NodeId, NodeRecord,
    Observed, Pins, VmRecord,
};

/// Most VMs of the cluster.
pub const VMS_MAX: usize = 200_000;
/// Most VMs of one node: as many as one plan may list.
pub const NODE_VMS_MAX: usize = blixard_agent_api::plan::VMS_MAX;
/// How long the answer of a mutation with an idempotency key is kept, in milliseconds.
pub const ANSWER_KEPT_MS: u64 = 24 * 60 * 60 * 1000;
/// Most answers that are kept; the oldest go first.
pub const ANSWERS_MAX: usize = 10_000;

/// Most bytes of a plan: what an agent accepts in one message, with room for networks and content.
pub const PLAN_BYTES_MAX: u64 = 15 << 20;
/// Most bytes that a VM adds to a plan besides its command line, program and environment.
const VM_PLAN_BYTES: u64 = 1200;

/// Which record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordKey {
    /// The cluster.
    Cluster,
    /// A node.
    Node(NodeId),
    /// A network by name.
    Network(String),
    /// An image by name.
    Image(String),
    /// A kernel by name.
    Kernel(String),
    /// A VM.
    Vm(VmId),
    /// A kept answer by idempotency key.
    Answer(String),
    /// Whom nodes trust.
    Trust,
    /// A join token by the digest of its secret.
    JoinToken(String),
    /// A token for the API by name.
    ApiToken(String),
}

impl fmt::Display for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster => f.write_str("cluster"),
            Self::Node(id) => write!(f, "node/{id}"),
            Self::Network(name) => write!(f, "network/{name}"),
            Self::Image(name) => write!(f, "image/{name}"),
            Self::Kernel(name) => write!(f, "kernel/{name}"),
            Self::Vm(id) => write!(f, "vm/{id}"),
            Self::Answer(key) => write!(f, "answer/{key}"),
            Self::Trust => f.write_str("trust"),
            Self::JoinToken(sha256) => write!(f, "join-token/{sha256}"),
            Self::ApiToken(name) => write!(f, "api-token/{name}"),
        }
    }
}

/// A stored record that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No kind of record has such a key.
    #[error("{0:?} is no key of a record")]
    Key(String),
    /// The record is not of its kind.
    #[error("cannot read the record {key}")]
    Value {
        /// Its key.
        key: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The record cannot be written.
    #[error("cannot encode the record {key}")]
    Encode {
        /// Its key.
        key: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// The replicated state.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Index of the newest applied log entry.
    revision: u64,
    cluster: Option<Arc<ClusterRecord>>,
    nodes: BTreeMap<NodeId, Arc<NodeRecord>>,
    networks: BTreeMap<String, Arc<NetworkRecord>>,
    images: BTreeMap<String, Arc<ImageRecord>>,
    kernels: BTreeMap<String, Arc<KernelRecord>>,
    vms: BTreeMap<VmId, Arc<VmRecord>>,
    answers: BTreeMap<String, Arc<KeptAnswer>>,
    trust: Option<Arc<TrustRecord>>,
    join_tokens: BTreeMap<String, Arc<JoinTokenRecord>>,
    api_tokens: BTreeMap<String, Arc<ApiTokenRecord>>,
    /// VMs by project and name.
    names: BTreeMap<String, BTreeMap<String, VmId>>,
    /// VMs by network and host number.
    hosts: BTreeMap<String, BTreeMap<u32, VmId>>,
    /// Kept answers by age.
    answer_ages: BTreeMap<u64, String>,
    /// Bytes of the plan of each node, at most.
    plan_bytes: BTreeMap<NodeId, u64>,
    /// Number of VMs of each node.
    node_vms: BTreeMap<NodeId, usize>,
    /// Where there is room, as the scheduler sees it.
    view: View,
    /// Records that changed since they were stored.
    changed: BTreeSet<RecordKey>,
}

impl PartialEq for State {
    /// Equal records, whatever has been stored of them.
    fn eq(&self, other: &Self) -> bool {
        self.revision == other.revision
            && self.cluster == other.cluster
            && self.nodes == other.nodes
            && self.networks == other.networks
            && self.images == other.images
            && self.kernels == other.kernels
            && self.vms == other.vms
            && self.answers == other.answers
            && self.trust == other.trust
            && self.join_tokens == other.join_tokens
            && self.api_tokens == other.api_tokens
            && self.names == other.names
            && self.hosts == other.hosts
            && self.answer_ages == other.answer_ages
            && self.plan_bytes == other.plan_bytes
            && self.node_vms == other.node_vms
    }
}

impl State {
    /// Index of the newest applied log entry.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The cluster, once it was made.
    pub fn cluster(&self) -> Option<&Arc<ClusterRecord>> {
        self.cluster.as_ref()
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> Option<&Arc<NodeRecord>> {
        self.nodes.get(&id)
    }

    /// Nodes in order of number.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<NodeRecord>> {
        self.nodes.values()
    }

    /// A node by name.
    pub fn node_named(&self, name: &str) -> Option<&Arc<NodeRecord>> {
        self.nodes.values().find(|node| node.name == name)
    }

    /// Whom nodes trust, once other nodes can join.
    pub fn trust(&self) -> Option<&Arc<TrustRecord>> {
        self.trust.as_ref()
    }

    /// Join tokens that were not used.
    pub fn join_tokens(&self) -> impl Iterator<Item = &Arc<JoinTokenRecord>> {
        self.join_tokens.values()
    }

    /// Tokens for the API in order of name.
    pub fn api_tokens(&self) -> impl Iterator<Item = &Arc<ApiTokenRecord>> {
        self.api_tokens.values()
    }

    /// Where there is room, as the scheduler sees it. A clone is a snapshot to plan with.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Networks in order of name.
    pub fn networks(&self) -> impl Iterator<Item = &Arc<NetworkRecord>> {
        self.networks.values()
    }

    /// A network.
    pub fn network(&self, name: &str) -> Option<&Arc<NetworkRecord>> {
        self.networks.get(name)
    }

    /// Images in order of name.
    pub fn images(&self) -> impl Iterator<Item = &Arc<ImageRecord>> {
        self.images.values()
    }

    /// An image by name, or else by digest.
    pub fn image(&self, name: &str) -> Option<&Arc<ImageRecord>> {
        self.images.get(name).or_else(|| {
            let digest = name.parse().ok()?;
            self.images.values().find(|image| image.blob.digest == digest)
        })
    }

    /// Kernels in order of name.
    pub fn kernels(&self) -> impl Iterator<Item = &Arc<KernelRecord>> {
        self.kernels.values()
    }

    /// A kernel by name.
    pub fn kernel(&self, name: &str) -> Option<&Arc<KernelRecord>> {
        self.kernels.get(name)
    }

    /// VMs in order of id.
    pub fn vms(&self) -> impl Iterator<Item = &Arc<VmRecord>> {
        self.vms.values()
    }

    /// Number of VMs.
    pub fn vm_count(&self) -> usize {
        self.vms.len()
    }

    /// A VM.
    pub fn vm(&self, id: VmId) -> Option<&Arc<VmRecord>> {
        self.vms.get(&id)
    }

    /// A VM by its project and name.
    pub fn vm_named(&self, project: &str, name: &str) -> Option<&Arc<VmRecord>> {
        self.vms.get(self.names.get(project)?.get(name)?)
    }

    /// VMs of a project in order of name, beginning after `after`.
    pub fn vms_of<'a>(
        &'a self,
        project: &str,
        after: Option<&str>,
    ) -> impl Iterator<Item = &'a Arc<VmRecord>> + use<'a> {
        use std::ops::Bound;
        let begin = after.map_or(Bound::Unbounded, |name| Bound::Excluded(name.to_owned()));
        let names = self.names.get(project);
        names
            .into_iter()
            .flat_map(move |names| names.range((begin.clone(), Bound::Unbounded)))
            .filter_map(|(_, id)| self.vms.get(id))
    }

    /// The kept answer of an idempotency key.
    pub fn kept_answer(&self, key: &str) -> Option<&Arc<KeptAnswer>> {
        self.answers.get(key)
    }

    /// True when some image, kernel or VM needs this content.
    pub fn needs(&self, digest: blixard_agent_api::Digest) -> bool {
        self.images.values().any(|i| i.blob.digest == digest)
            || self.kernels.values().any(|k| k.kernel.digest == digest || k.initramfs.digest == digest)
            || self.vms.values().any(|vm| vm.blobs().iter().any(|b| b.digest == digest))
    }

    /// The keys of the records that changed since the last call.
    pub fn take_changed(&mut self) -> BTreeSet<RecordKey> {
        std::mem::take(&mut self.changed)
    }

    /// The record of this key as it is stored; `None` when there is none (any more).
    ///
    /// # Errors
    /// [`RecordError::Encode`].
    pub fn record(&self, key: &RecordKey) -> Result<Option<Vec<u8>>, RecordError> {
        match key {
            RecordKey::Cluster => encode(key, self.cluster.as_ref()),
            RecordKey::Node(id) => encode(key, self.nodes.get(id)),
            RecordKey::Network(name) => encode(key, self.networks.get(name)),
            RecordKey::Image(name) => encode(key, self.images.get(name)),
            RecordKey::Kernel(name) => encode(key, self.kernels.get(name)),
            RecordKey::Vm(id) => encode(key, self.vms.get(id)),
            RecordKey::Answer(text) => encode(key, self.answers.get(text)),
            RecordKey::Trust => encode(key, self.trust.as_ref()),
            RecordKey::JoinToken(sha256) => encode(key, self.join_tokens.get(sha256)),
            RecordKey::ApiToken(name) => encode(key, self.api_tokens.get(name)),
        }
    }

    /// The keys of all records.
    pub fn keys(&self) -> Vec<RecordKey> {
        let mut keys = Vec::new();
        keys.extend(self.cluster.iter().map(|_| RecordKey::Cluster));
        keys.extend(self.nodes.keys().map(|id| RecordKey::Node(*id)));
        keys.extend(self.networks.keys().cloned().map(RecordKey::Network));
        keys.extend(self.images.keys().cloned().map(RecordKey::Image));
        keys.extend(self.kernels.keys().cloned().map(RecordKey::Kernel));
        keys.extend(self.vms.keys().map(|id| RecordKey::Vm(*id)));
        keys.extend(self.answers.keys().cloned().map(RecordKey::Answer));
        keys.extend(self.trust.iter().map(|_| RecordKey::Trust));
        keys.extend(self.join_tokens.keys().cloned().map(RecordKey::JoinToken));
        keys.extend(self.api_tokens.keys().cloned().map(RecordKey::ApiToken));
        keys
    }

    /// The state that these stored records make up.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn from_records(
        revision: u64,
        records: impl IntoIterator<Item = (String, Vec<u8>)>,
    ) -> Result<Self, RecordError> {
        let mut state = Self::begin(revision);
        for (key, value) in records {
            state.load(&key, &value)?;
        }
        state.loaded();
        Ok(state)
    }

    /// An empty state of this revision, to be filled with stored records.
    pub fn begin(revision: u64) -> Self {
        Self { revision, ..Self::default() }
    }

    /// Adds a stored record.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn load(&mut self, key: &str, value: &[u8]) -> Result<(), RecordError> {
        let kind = key.split_once('/').map_or(key, |(kind, _)| kind);
        match kind {
            "cluster" => self.cluster = Some(decode(key, value)?),
            "node" => {
                let node: Arc<NodeRecord> = decode(key, value)?;
                self.nodes.insert(node.id, node);
            }
            "network" => {
                let network: Arc<NetworkRecord> = decode(key, value)?;
                self.networks.insert(network.name.clone(), network);
            }
            "image" => {
                let image: Arc<ImageRecord> = decode(key, value)?;
                self.images.insert(image.name.clone(), image);
            }
            "kernel" => {
                let kernel: Arc<KernelRecord> = decode(key, value)?;
                self.kernels.insert(kernel.name.clone(), kernel);
            }
            "vm" => {
                let vm: Arc<VmRecord> = decode(key, value)?;
                self.index(&vm);
                self.vms.insert(vm.id, vm);
            }
            "answer" => {
                let kept: Arc<KeptAnswer> = decode(key, value)?;
                self.answer_ages.insert(kept.revision, kept.key.clone());
                self.answers.insert(kept.key.clone(), kept);
            }
            "trust" => self.trust = Some(decode(key, value)?),
            "join-token" => {
                let token: Arc<JoinTokenRecord> = decode(key, value)?;
                self.join_tokens.insert(token.sha256.clone(), token);
            }
            "api-token" => {
                let token: Arc<ApiTokenRecord> = decode(key, value)?;
                self.api_tokens.insert(token.name.clone(), token);
            }
            _ => return Err(RecordError::Key(key.to_owned())),
        }
        Ok(())
    }

    fn index(&mut self, vm: &VmRecord) {
        self.names.entry(vm.project.clone()).or_default().insert(vm.name.clone(), vm.id);
        if let Some(nic) = &vm.nic {
            self.hosts.entry(nic.network.clone()).or_default().insert(nic.host, vm.id);
        }
        let bytes = self.plan_bytes.entry(vm.node).or_default();
        *bytes = bytes.saturating_add(vm_plan_bytes(vm));
        *self.node_vms.entry(vm.node).or_default() += 1;
    }

    fn unindex(&mut self, vm: &VmRecord) {
        self.view.take(vm.node, vm.id);
        if let Some(count) = self.node_vms.get_mut(&vm.node) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.node_vms.remove(&vm.node);
            }
        }
        let bytes = self.plan_bytes.entry(vm.node).or_default();
        *bytes = bytes.saturating_sub(vm_plan_bytes(vm));
        if *bytes == 0 {
            self.plan_bytes.remove(&vm.node);
        }
        if let Some(names) = self.names.get_mut(&vm.project) {
            names.remove(&vm.name);
            if names.is_empty() {
                self.names.remove(&vm.project);
            }
        }
        let Some(nic) = &vm.nic else { return };
        if let Some(hosts) = self.hosts.get_mut(&nic.network) {
            hosts.remove(&nic.host);
            if hosts.is_empty() {
                self.hosts.remove(&nic.network);
            }
        }
    }
}

/// Bytes that a VM adds to the plan of its node, at most.
fn vm_plan_bytes(vm: &VmRecord) -> u64 {
    let json = |length: Result<Vec<u8>, serde_json::Error>| length.map_or(0, |text| text.len());
    let health = vm.health.as_ref().map_or(0, |check| json(serde_json::to_vec(check)));
    let words = json(serde_json::to_vec(&vm.workload)) + json(serde_json::to_vec(&vm.spec.cmdline)) + health;
    VM_PLAN_BYTES.saturating_add(u64::try_from(words).unwrap_or(u64::MAX))
}

fn encode<T: Serialize>(key: &RecordKey, record: Option<&Arc<T>>) -> Result<Option<Vec<u8>>, RecordError> {
    let Some(record) = record else { return Ok(None) };
    let bytes = serde_json::to_vec(record.as_ref());
    bytes.map(Some).map_err(|source| RecordError::Encode { key: key.to_string(), source })
}

fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<Arc<T>, RecordError> {
    let record = serde_json::from_slice(value);
    record.map(Arc::new).map_err(|source| RecordError::Value { key: key.to_owned(), source })
}
