//! The closed list of changes to the replicated state, and their answers.
//!
//! A command says what somebody wants; whether it is legal at that moment is decided where it is applied, on every
//! replica alike. Commands are stored as JSON in the log: a variant or field is only added, and a new variant is only
//! proposed once the feature level of the cluster says that every member knows it.

use std::fmt;
use std::sync::Arc;

use blixard_agent_api::Digest;
use blixard_api::VmId;
use blixard_api::vm::VmSpec;
use serde::{Deserialize, Serialize};

use super::member::MemberCommand;
use super::placement::{Departure, NodeChange, VmChange};
use super::records::{ImageRecord, KernelRecord, NetworkRecord, NodeId, NodeRecord, Observed, VmRecord};

/// A command on its way through the log, with what its application may not find out by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The proposer's clock, in milliseconds of Unix time: applying reads no clock.
    pub now_ms: u64,
    /// Idempotency key of the client, if any.
    #[serde(default)]
    pub key: Option<Key>,
    /// What is wanted.
    pub command: Command,
}

/// An idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The client's text, at most 128 characters.
    pub text: String,
    /// Digest of the request.
    pub fingerprint: Digest,
}

/// Everything that can change the replicated state. Each changes at most one VM, so that a revision is one event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Makes the cluster, its default network and its first node. Legal once.
    InitCluster {
        /// Feature level to begin with.
        feature_level: u32,
        /// The default network.
        network: NetworkRecord,
        /// Number of the first node.
        node: NodeId,
        /// Its name.
        node_name: String,
        /// How long a lease lasts, in milliseconds ([`ClusterRecord::lease_ms`](super::ClusterRecord::lease_ms)).
        #[serde(
            default = "super::records::default_lease_ms",
            skip_serializing_if = "super::records::is_default_lease"
        )]
        lease_ms: u64,
    },
    /// Gives a node another name. Legal for a known node.
    RenameNode {
        /// Which.
        node: NodeId,
        /// The name.
        name: String,
    },
    /// Makes a VM, gives it addresses and places it on a node. Legal when id and name are free and image, kernel, network
    /// and node are known; repeating it with the same id, name and spec answers the VM that is there.
    CreateVm {
        /// Identity.
        id: VmId,
        /// Project.
        project: String,
        /// Name.
        name: String,
        /// What it shall be; checked by the proposer.
        spec: Box<VmSpec>,
        /// Where it is placed.
        node: NodeId,
        /// There is no room yet: it is placed when there is.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        waits: bool,
    },
    /// Asks a VM to run. Legal unless it is being deleted. Begins a new start when the newest one has ended or a stop was
    /// asked for; otherwise it is there already.
    StartVm {
        /// Which.
        id: VmId,
        /// Refused when the VM has another generation.
        #[serde(default)]
        if_generation: Option<u64>,
    },
    /// Asks a VM to stop. Legal unless it is being deleted. Repeating it can change the grace time.
    StopVm {
        /// Which.
        id: VmId,
        /// Time that the guest has, in milliseconds.
        grace_ms: u64,
        /// Refused when the VM has another generation.
        #[serde(default)]
        if_generation: Option<u64>,
    },
    /// Asks for a VM to be gone. Legal when it does not run, or with `force`. Repeating it changes nothing.
    DeleteVm {
        /// Which.
        id: VmId,
        /// Also when it runs.
        force: bool,
        /// Refused when the VM has another generation.
        #[serde(default)]
        if_generation: Option<u64>,
    },
    /// Forgets a VM whose node confirmed that nothing of it is left, and frees its addresses and name. Without effect when
    /// the VM is unknown, not to be gone, or has been placed again since.
    ForgetVm {
        /// Which.
        id: VmId,
        /// Placement that is gone.
        epoch: u64,
    },
    /// Keeps what a node tells about a VM. Without effect when it is about another placement or an older start.
    RecordReport {
        /// Which.
        id: VmId,
        /// Who tells.
        node: NodeId,
        /// Placement it is about.
        epoch: u64,
        /// What is told.
        observed: Box<Observed>,
    },
    /// Makes an image known by name; a name that exists points to the new content from then on.
    PutImage(Box<ImageRecord>),
    /// Forgets an image by name or digest. Legal when no VM was made from it.
    DeleteImage {
        /// Name or digest.
        name: String,
    },
    /// Makes a kernel known by name; a name that exists points to the new content from then on.
    PutKernel(Box<KernelRecord>),
    /// Forgets a kernel by name. Legal when no VM was made with it.
    DeleteKernel {
        /// Name.
        name: String,
    },
    /// Changes the cluster itself.
    Member(Box<MemberCommand>),
    /// Changes what a node offers, or whether it counts as answering. Legal for a known node; see [`NodeChange`].
    Node {
        /// Which.
        node: NodeId,
        /// What changes.
        change: NodeChange,
    },
    /// Moves a VM or starts it again. Legal for its present placement; see [`VmChange`].
    Vm {
        /// Which.
        id: VmId,
        /// Placement that is meant.
        epoch: u64,
        /// What changes.
        change: VmChange,
    },
}

/// Feature level from which on VMs are placed by what nodes offer, moved and started again.
pub const PLACEMENT_LEVEL: u32 = 3;

/// Feature level from which on VMs have health checks, and nodes that were declared down are counted by entries of the log.
pub const HEALTH_LEVEL: u32 = 4;

/// Feature level from which on a node that has not told what it has takes no VM, and a VM keeps its room until its policy starts it again.
pub const ROOM_LEVEL: u32 = 5;

/// Feature level from which on a cluster may have another length of leases than [`LEASE_MS`](super::records::LEASE_MS).
pub const LEASE_LEVEL: u32 = 6;

/// Whether a spec says something about its place or restarts.
fn asks_for_a_place(spec: &VmSpec) -> bool {
    !spec.placement.is_default() || !spec.restart.is_default()
}

impl Command {
    /// Name of the variant, for logs and metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::InitCluster { .. } => "init_cluster",
            Self::RenameNode { .. } => "rename_node",
            Self::CreateVm { .. } => "create_vm",
            Self::StartVm { .. } => "start_vm",
            Self::StopVm { .. } => "stop_vm",
            Self::DeleteVm { .. } => "delete_vm",
            Self::ForgetVm { .. } => "forget_vm",
            Self::RecordReport { .. } => "record_report",
            Self::PutImage(_) => "put_image",
            Self::DeleteImage { .. } => "delete_image",
            Self::PutKernel(_) => "put_kernel",
            Self::DeleteKernel { .. } => "delete_kernel",
            Self::Node { .. } => "node",
            Self::Vm { .. } => "vm",
            Self::Member(command) => command.kind(),
        }
    }

    /// Whether proposing it a second time, after the first time was applied unnoticed, does no more than once: it names what it
    /// makes, or the placement, start or token that it is about.
    pub fn may_be_repeated(&self) -> bool {
        matches!(
            self,
            Self::CreateVm { .. }
                | Self::ForgetVm { .. }
                | Self::RecordReport { .. }
                | Self::Vm { .. }
                | Self::PutImage(_)
                | Self::PutKernel(_)
        ) || matches!(self, Self::Member(command) if matches!(**command, MemberCommand::Join { .. } | MemberCommand::Announce { .. }))
    }

    /// The feature level of the cluster from which on it may be proposed: before, a member could meet it that does not
    /// know it.
    pub fn level(&self) -> u32 {
        match self {
            Self::Member(command) => command.level(),
            Self::Vm {
                change: VmChange::Unhealthy { .. } | VmChange::Evict { why: Departure::Unhealthy, .. },
                ..
            } => HEALTH_LEVEL,
            Self::Node { change: NodeChange::Down { settled: Some(_), .. }, .. } => HEALTH_LEVEL,
            Self::CreateVm { spec, .. } if spec.health.is_some() => HEALTH_LEVEL,
            Self::PutImage(image) if image.config.health.is_some() => HEALTH_LEVEL,
            Self::RecordReport { observed, .. } if observed.health.is_some() => HEALTH_LEVEL,
            Self::Node { .. } | Self::Vm { .. } => PLACEMENT_LEVEL,
            // Older programs know neither the fields nor VMs that wait for a node.
            Self::CreateVm { spec, waits, .. } if *waits || asks_for_a_place(spec) => PLACEMENT_LEVEL,
            _ => 1,
        }
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.command.kind())
    }
}

/// What applying a command answers.
pub type Outcome = Result<Answer, Refusal>;

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is so now.
    Done,
    /// The VM as it is now.
    Vm {
        /// The VM.
        vm: Arc<VmRecord>,
        /// This command made it.
        created: bool,
    },
    /// The image as it is now, or was.
    Image(Arc<ImageRecord>),
    /// The kernel as it is now, or was.
    Kernel(Arc<KernelRecord>),
    /// The node as it is now, or was.
    Node(Arc<NodeRecord>),
}

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// There is a cluster already.
    #[error("the cluster exists already")]
    Initialised,
    /// There is no such node.
    #[error("there is no node {0}")]
    NoNode(NodeId),
    /// There is no such VM.
    #[error("there is no such VM")]
    NoVm,
    /// There is no such image.
    #[error("there is no image {0:?}")]
    NoImage(String),
    /// There is no such kernel.
    #[error("there is no kernel {0:?}")]
    NoKernel(String),
    /// There is no such network.
    #[error("there is no network {0:?}")]
    NoNetwork(String),
    /// Another VM of the project has this name.
    #[error("a VM named {name:?} exists already ({id})")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        id: VmId,
    },
    /// A VM with this id exists and is another one.
    #[error("the id {0} belongs to a VM with another name or spec")]
    IdTaken(VmId),
    /// All addresses of the network are in use.
    #[error("network {0:?} has no free address")]
    NetworkFull(String),
    /// More VMs than one node can be asked for.
    #[error("there are {0} VMs already, more are not possible")]
    TooMany(usize),
    /// All VMs of a node together must fit one message to its agent.
    #[error("the commands and environments of the VMs of this node are too long together")]
    PlanFull,
    /// The VM has changed since.
    #[error("the VM has generation {now}")]
    Generation {
        /// The present generation.
        now: u64,
    },
    /// The VM runs.
    #[error("the VM {0:?} is not stopped")]
    Runs(String),
    /// The VM is being deleted.
    #[error("the VM {0:?} is being deleted")]
    Leaving(String),
    /// VMs were made from it.
    #[error("in use by {}", names(vms, *more))]
    InUse {
        /// Some of their names.
        vms: Vec<String>,
        /// How many more there are.
        more: usize,
    },
    /// There is no such token, or it was used.
    #[error("there is no such token: it was mistyped, used or revoked")]
    NoToken,
    /// The token's time is over.
    #[error("the token has expired")]
    TokenExpired,
    /// More tokens than are kept.
    #[error("there are {0} tokens already, more are not possible")]
    TooManyTokens(usize),
    /// More nodes than are possible.
    #[error("there are {0} nodes already, more are not possible")]
    TooManyNodes(usize),
    /// Another node has this name.
    #[error("a node named {0:?} exists already")]
    NodeNameTaken(String),
    /// A cluster has a node.
    #[error("the only node of a cluster cannot be removed")]
    LastNode,
    /// The node's program is too old.
    #[error("the cluster has feature level {needs}, the node knows up to {has}")]
    Level {
        /// The feature level of the cluster.
        needs: u32,
        /// What the node knows.
        has: u32,
    },
    /// Some node's program is too old.
    #[error("node {name:?} knows up to feature level {knows}, {wanted} is wanted")]
    NodeBehind {
        /// Its name.
        name: String,
        /// What it knows.
        knows: u32,
        /// What is wanted.
        wanted: u32,
    },
    /// Somebody else was faster.
    #[error("{0} changed meanwhile")]
    Changed(String),
    /// The VM was placed again since.
    #[error("the VM has epoch {now}")]
    Epoch {
        /// The present epoch.
        now: u64,
    },
    /// The VM may still be on its node.
    #[error("the node of the VM {0:?} has not given it up")]
    NotReleased(String),
    /// The node cannot take the VM, or not any more.
    #[error("node {node} cannot take the VM: {why}")]
    NoRoom {
        /// Name of the node.
        node: String,
        /// The constraint.
        why: String,
    },
    /// Nobody has suspected the node before.
    #[error("node {0} is not suspected")]
    NotSuspected(NodeId),
    /// Too many nodes were declared down just before: more likely something else is wrong.
    #[error("{recent} nodes were declared down within a minute, {most} are possible without an operator")]
    TooManyDown {
        /// How many.
        recent: usize,
        /// How many are possible.
        most: usize,
    },
    /// The idempotency key came with another request before.
    #[error("this idempotency key was used for another request")]
    KeyReused,
}

fn names(vms: &[String], more: usize) -> String {
    let named = vms.join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}
