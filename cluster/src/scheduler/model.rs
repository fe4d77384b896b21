//! What the scheduler knows of nodes and VMs, and what it answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blixard_agent_api::Digest;
use blixard_api::VmId;
use blixard_api::placement::{AntiAffinity, Arch, Placement, Scope, Taint};

use crate::state::NodeId;

/// What a VM takes of a node, or a node has for VMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// Processors in thousandths.
    pub cpu_milli: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Space for volumes in MiB.
    pub disk_mib: u64,
}

impl Size {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            disk_mib: self.disk_mib.saturating_add(other.disk_mib),
        }
    }

    /// What is left of this without the other; never less than nothing.
    pub fn minus(self, other: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_sub(other.cpu_milli),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            disk_mib: self.disk_mib.saturating_sub(other.disk_mib),
        }
    }
}

/// Which resource is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// Processors.
    Cpu,
    /// Memory.
    Memory,
    /// Space for volumes.
    Disk,
}

/// A node as the scheduler knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeInfo {
    /// Number.
    pub id: NodeId,
    /// Name: the value of the label `node`.
    pub name: String,
    /// Processor architecture.
    pub arch: Arch,
    /// What VMs may take together, with overcommit and without reserves; absent while the node has not told.
    pub room: Option<Size>,
    /// Devices by kind.
    pub accelerators: BTreeMap<String, u32>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Taints.
    pub taints: Vec<Taint>,
    /// It answers.
    pub up: bool,
    /// It takes no new VMs.
    pub cordoned: bool,
    /// What it costs, in any unit that all nodes share.
    pub cost: u32,
    /// Images that are there.
    pub images: Arc<BTreeSet<Digest>>,
}

impl NodeInfo {
    /// The value of a label; `node` is the name.
    pub fn label(&self, key: &str) -> Option<&str> {
        if key == Scope::Node.name() {
            return Some(&self.name);
        }
        self.labels.get(key).map(String::as_str)
    }

    /// It takes new VMs.
    pub fn takes(&self) -> bool {
        self.up && !self.cordoned
    }
}

/// A VM that has a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Which.
    pub id: VmId,
    /// Its project: groups are per project.
    pub project: String,
    /// What it takes.
    pub size: Size,
    /// Devices by kind.
    pub accelerators: BTreeMap<String, u32>,
    /// Its groups.
    pub groups: Vec<AntiAffinity>,
    /// Its priority.
    pub priority: u16,
    /// It is not stopped to make room: it waits for its node, or does not run.
    pub stays: bool,
}

/// Where the data of a VM lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data<'a> {
    /// It has none yet, or it can be reached from everywhere alike.
    Anywhere,
    /// It can be used on these nodes only.
    Only(&'a [NodeId]),
    /// It can be used everywhere, the nearer the better.
    Near(&'a [NodeId]),
}

/// A VM that needs a place.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Its project.
    pub project: &'a str,
    /// What it takes.
    pub size: Size,
    /// What it asks for.
    pub placement: &'a Placement,
    /// Its image.
    pub image: Option<Digest>,
    /// Its data.
    pub data: Data<'a>,
    /// Nodes that refused it, or where it failed.
    pub avoid: &'a [NodeId],
    /// A node that has not told what it has counts as large enough. Where nodes can tell, only those that did are asked for a
    /// VM: what is placed on others may be more than they have.
    pub untold: bool,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// There.
    Place {
        /// The node.
        node: NodeId,
        /// VMs that must have gone before, in order of id; all of lower priority.
        victims: Vec<VmId>,
    },
    /// Nowhere.
    Refused(Explanation),
}

/// Which constraint refused a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The node is down.
    Down,
    /// The node is cordoned.
    Cordoned,
    /// The node refused this VM, or it failed there.
    Avoided,
    /// The node has another architecture.
    Arch,
    /// Constraint number n of the placement, from 0.
    Constraint(usize),
    /// The node has a taint that is not tolerated.
    Taint,
    /// The data is elsewhere.
    Data,
    /// A member of a group is too near.
    AntiAffinity,
    /// It has not told yet what it has.
    Untold,
    /// Not enough devices.
    Accelerators,
    /// Not enough room.
    Room(Resource),
}

/// Why nodes are possible or not. A node counts where it was refused first, in the order of [`Reason`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Explanation {
    /// All nodes.
    pub nodes: usize,
    /// Those that are possible.
    pub possible: usize,
    /// How many each constraint refused.
    pub refused: BTreeMap<Reason, usize>,
}

impl Explanation {
    /// A constraint in words.
    pub fn words(reason: Reason, placement: &Placement) -> String {
        match reason {
            Reason::Down => "the node is down".into(),
            Reason::Cordoned => "the node is cordoned".into(),
            Reason::Avoided => "the node refused this VM".into(),
            Reason::Arch => "architecture".into(),
            Reason::Constraint(number) => {
                placement.constraints.get(number).map_or_else(|| "constraint".into(), ToString::to_string)
            }
            Reason::Taint => "taint without toleration".into(),
            Reason::Data => "its data is on another node".into(),
            Reason::AntiAffinity => "anti-affinity".into(),
            Reason::Untold => "the node has not told yet what it has".into(),
            Reason::Accelerators => "not enough accelerators".into(),
            Reason::Room(Resource::Cpu) => "not enough processors".into(),
            Reason::Room(Resource::Memory) => "not enough memory".into(),
            Reason::Room(Resource::Disk) => "not enough disk".into(),
        }
    }
}
