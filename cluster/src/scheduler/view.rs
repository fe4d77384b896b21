//! The cluster as the scheduler sees it: nodes with what is placed on them, in order of fullness, and members of groups by
//! failure domain. Kept up to date VM by VM; a clone shares all nodes and groups and is made in the time that copying a
//! few thousand pointers takes, so any number of planners can work on snapshots.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use blixard_api::VmId;
use blixard_api::placement::{AntiAffinity, Scope};

use super::model::{NodeInfo, Placed, Request, Resource, Size};
use crate::state::NodeId;

/// Fullness of a node whose scarcest resource is used up.
pub const FULL: u16 = 1000;
/// Into how many parts groups are split, so that a change after a snapshot copies few of them.
const SHARDS: usize = 64;

/// A node and what is placed on it.
#[derive(Debug, Clone)]
pub struct NodeState {
    /// What is known of it.
    pub info: NodeInfo,
    /// What its VMs take together.
    pub used: Size,
    /// Devices that its VMs take, by kind.
    pub used_accelerators: BTreeMap<String, u32>,
    /// Its VMs.
    pub vms: BTreeMap<VmId, Arc<Placed>>,
    /// What its VMs that may be stopped for others take together, by priority.
    pub by_priority: BTreeMap<u16, (u32, Size)>,
    /// Its failure domains, one per scope.
    pub domains: [u32; 4],
    /// See [`View`].
    class: u32,
}

impl NodeState {
    /// How full it is by its scarcest resource, 0 to [`FULL`]. A node that has not told its room counts as empty.
    pub fn fullness(&self) -> u16 {
        let Some(room) = self.info.room else { return 0 };
        let share = |used: u64, all: u64| {
            let full = u64::from(FULL);
            u16::try_from(used.saturating_mul(full).checked_div(all).unwrap_or(full).min(full))
                .unwrap_or(FULL)
        };
        share(self.used.memory_mib, room.memory_mib).max(share(self.used.cpu_milli, room.cpu_milli))
    }

    /// The first resource of which `size` finds too little beside what is used without `freed`.
    pub fn short_of(&self, size: Size, freed: Size) -> Option<Resource> {
        let room = self.info.room?;
        let after = self.used.minus(freed).plus(size);
        if size.cpu_milli > 0 && after.cpu_milli > room.cpu_milli {
            Some(Resource::Cpu)
        } else if size.memory_mib > 0 && after.memory_mib > room.memory_mib {
            Some(Resource::Memory)
        } else if size.disk_mib > 0 && after.disk_mib > room.disk_mib {
            Some(Resource::Disk)
        } else {
            None
        }
    }

    /// Whether there are enough devices besides those that are used.
    pub fn has_accelerators(&self, wanted: &BTreeMap<String, u32>) -> bool {
        wanted.iter().all(|(kind, count)| {
            let used = self.used_accelerators.get(kind).copied().unwrap_or(0);
            let there = self.info.accelerators.get(kind).copied().unwrap_or(0);
            used.saturating_add(*count) <= there
        })
    }

    /// Number of its class: nodes of one class are alike in labels, taints, architecture and cost.
    pub fn class(&self) -> u32 {
        self.class
    }

    fn add(&mut self, vm: &Arc<Placed>) {
        self.used = self.used.plus(vm.size);
        if !vm.stays {
            let of_priority = self.by_priority.entry(vm.priority).or_default();
            *of_priority = (of_priority.0.saturating_add(1), of_priority.1.plus(vm.size));
        }
        for (kind, count) in &vm.accelerators {
            let used = self.used_accelerators.entry(kind.clone()).or_default();
            *used = used.saturating_add(*count);
        }
        self.vms.insert(vm.id, Arc::clone(vm));
    }

    fn take(&mut self, id: VmId) -> Option<Arc<Placed>> {
        let vm = self.vms.remove(&id)?;
        self.used = self.used.minus(vm.size);
        if let Some((count, size)) = self.by_priority.get_mut(&vm.priority).filter(|_| !vm.stays) {
            *count = count.saturating_sub(1);
            *size = size.minus(vm.size);
            if *count == 0 {
                self.by_priority.remove(&vm.priority);
            }
        }
        for (kind, count) in &vm.accelerators {
            if let Some(used) = self.used_accelerators.get_mut(kind) {
                *used = used.saturating_sub(*count);
                if *used == 0 {
                    self.used_accelerators.remove(kind);
                }
            }
        }
        Some(vm)
    }
}

/// Members of a group in one failure domain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Members {
    all: u32,
    /// Those that insist on keeping apart by this very scope.
    hard: u32,
}

/// Members of a group by scope and failure domain.
#[derive(Debug, Clone, Default)]
struct Group {
    by_scope: [HashMap<u32, Members>; 4],
    /// How many members insist on each scope.
    hard: [u32; 4],
}

type GroupKey = (String, String);
type Shard = Arc<BTreeMap<GroupKey, Arc<Group>>>;

/// The cluster as the scheduler sees it.
#[derive(Debug, Clone)]
pub struct View {
    /// Nodes in order of their first appearance.
    nodes: Vec<Arc<NodeState>>,
    index: BTreeMap<NodeId, usize>,
    /// Nodes that take VMs, by fullness, number of the node and place in `nodes`.
    order: BTreeSet<(u16, NodeId, usize)>,
    groups: Vec<Shard>,
    /// Names of failure domains.
    domains: Arc<BTreeMap<(Scope, String), u32>>,
    /// Classes by what their nodes have in common.
    classes: Arc<BTreeMap<ClassKey, u32>>,
    /// How many nodes have which cost, processors and memory.
    costs: BTreeMap<u32, usize>,
    cpus: BTreeMap<u64, usize>,
    memories: BTreeMap<u64, usize>,
}

type ClassKey = (String, u32);

impl Default for View {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            index: BTreeMap::new(),
            order: BTreeSet::new(),
            groups: vec![Arc::default(); SHARDS],
            domains: Arc::default(),
            classes: Arc::default(),
            costs: BTreeMap::new(),
            cpus: BTreeMap::new(),
            memories: BTreeMap::new(),
        }
    }
}

/// One more, or one less, of this value.
fn tally<K: Ord>(counts: &mut BTreeMap<K, usize>, key: K, come: bool) {
    if come {
        *counts.entry(key).or_default() += 1;
    } else if let Some(count) = counts.get_mut(&key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

fn shard(project: &str, group: &str) -> usize {
    let bytes = project.bytes().chain([0]).chain(group.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    usize::try_from(hash % (SHARDS as u64)).unwrap_or(0)
}

impl View {
    /// Nodes in order of their first appearance.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<NodeState>> {
        self.nodes.iter()
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> Option<&Arc<NodeState>> {
        self.nodes.get(*self.index.get(&id)?)
    }

    /// Number of nodes.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Number of classes ever seen.
    pub fn class_count(&self) -> usize {
        self.classes.len()
    }

    /// Nodes that take VMs and are at most this full, emptiest first.
    pub fn by_fullness(&self, most: u16) -> impl DoubleEndedIterator<Item = (u16, &Arc<NodeState>)> {
        let range = self.order.range(..=(most, NodeId::MAX, usize::MAX));
        range.filter_map(|(fullness, _, at)| Some((*fullness, self.nodes.get(*at)?)))
    }

    /// The most of each resource that a node has.
    pub fn largest(&self) -> Size {
        let most = |sizes: &BTreeMap<u64, usize>| sizes.last_key_value().map_or(0, |(size, _)| *size);
        Size { cpu_milli: most(&self.cpus), memory_mib: most(&self.memories), disk_mib: 0 }
    }

    /// Least and greatest cost of a node.
    pub fn costs(&self) -> (u32, u32) {
        let end = |entry: Option<(&u32, &usize)>| entry.map_or(0, |(cost, _)| *cost);
        (end(self.costs.first_key_value()), end(self.costs.last_key_value()))
    }

    /// Adds a node, or replaces what is known of it.
    pub fn set_node(&mut self, info: NodeInfo) {
        let domains = Scope::ALL.map(|scope| self.domain(scope, &info));
        let class = self.class_of(&info);
        self.tally_node(&info, true);
        match self.index.get(&info.id).copied() {
            Some(at) => {
                let Some(before) = self.nodes.get(at).cloned() else { return };
                self.tally_node(&before.info, false);
                self.unorder(at);
                // Domains may be others now: members move with their node.
                let moved = before.domains != domains;
                if moved {
                    before.vms.values().for_each(|vm| self.count(vm, before.domains, false));
                    before.vms.values().for_each(|vm| self.count(vm, domains, true));
                }
                if let Some(node) = self.nodes.get_mut(at) {
                    let node = Arc::make_mut(node);
                    node.info = info;
                    node.domains = domains;
                    node.class = class;
                }
                self.reorder(at);
            }
            None => {
                let at = self.nodes.len();
                self.index.insert(info.id, at);
                self.nodes.push(Arc::new(NodeState {
                    info,
                    used: Size::default(),
                    used_accelerators: BTreeMap::new(),
                    vms: BTreeMap::new(),
                    by_priority: BTreeMap::new(),
                    domains,
                    class,
                }));
                self.reorder(at);
            }
        }
    }

    /// Forgets a node with all that is placed on it.
    pub fn remove_node(&mut self, id: NodeId) {
        let Some(at) = self.index.get(&id).copied() else { return };
        let Some(node) = self.nodes.get(at).cloned() else { return };
        node.vms.values().for_each(|vm| self.count(vm, node.domains, false));
        self.tally_node(&node.info, false);
        self.unorder(at);
        let last = self.nodes.len().saturating_sub(1);
        if at != last {
            self.unorder(last);
        }
        self.index.remove(&id);
        self.nodes.swap_remove(at);
        if let Some(moved) = self.nodes.get(at).map(|node| node.info.id) {
            self.index.insert(moved, at);
            self.reorder(at);
        }
    }

    /// Puts a VM on a node. Without effect when there is no such node; a VM that is there already is replaced.
    pub fn put(&mut self, node: NodeId, vm: Placed) {
        self.take(node, vm.id);
        let Some(at) = self.index.get(&node).copied() else { return };
        self.unorder(at);
        let vm = Arc::new(vm);
        let mut domains = [0; 4];
        if let Some(node) = self.nodes.get_mut(at) {
            let node = Arc::make_mut(node);
            node.add(&vm);
            domains = node.domains;
        }
        self.count(&vm, domains, true);
        self.reorder(at);
    }

    /// Takes a VM off a node. Without effect when it is not there.
    pub fn take(&mut self, node: NodeId, vm: VmId) {
        let Some(at) = self.index.get(&node).copied() else { return };
        if !self.nodes.get(at).is_some_and(|node| node.vms.contains_key(&vm)) {
            return;
        }
        self.unorder(at);
        let taken = self.nodes.get_mut(at).and_then(|node| {
            let node = Arc::make_mut(node);
            Some((node.take(vm)?, node.domains))
        });
        if let Some((vm, domains)) = taken {
            self.count(&vm, domains, false);
        }
        self.reorder(at);
    }

    /// The groups of a request, to be asked about node after node.
    pub fn neighbours<'a>(&'a self, request: &'a Request<'_>) -> Neighbours<'a> {
        let known = |wanted: &'a AntiAffinity| {
            let shard = self.groups.get(shard(request.project, &wanted.group))?;
            let group = shard.get(&(request.project.to_owned(), wanted.group.clone()))?;
            Some((wanted, group.as_ref()))
        };
        Neighbours { groups: request.placement.anti_affinity.iter().filter_map(known).collect() }
    }

    fn domain(&mut self, scope: Scope, info: &NodeInfo) -> u32 {
        // Numbers, not names: a node may be given another name.
        let name = match scope {
            Scope::Node => info.id.to_string(),
            _ => info.label(scope.name()).unwrap_or_default().to_owned(),
        };
        let key = (scope, name);
        if let Some(number) = self.domains.get(&key) {
            return *number;
        }
        let number = u32::try_from(self.domains.len()).unwrap_or(u32::MAX);
        Arc::make_mut(&mut self.domains).insert(key, number);
        number
    }

    fn class_of(&mut self, info: &NodeInfo) -> u32 {
        let key = (format!("{:?} {:?} {:?}", info.arch, info.labels, info.taints), info.cost);
        if let Some(number) = self.classes.get(&key) {
            return *number;
        }
        let number = u32::try_from(self.classes.len()).unwrap_or(u32::MAX);
        Arc::make_mut(&mut self.classes).insert(key, number);
        number
    }

    fn tally_node(&mut self, info: &NodeInfo, come: bool) {
        tally(&mut self.costs, info.cost, come);
        // A node that has not told its room takes nothing.
        let room = info.room.unwrap_or_default();
        tally(&mut self.cpus, room.cpu_milli, come);
        tally(&mut self.memories, room.memory_mib, come);
    }

    fn unorder(&mut self, at: usize) {
        let Some(node) = self.nodes.get(at) else { return };
        self.order.remove(&(node.fullness(), node.info.id, at));
    }

    fn reorder(&mut self, at: usize) {
        let Some(node) = self.nodes.get(at) else { return };
        if node.info.takes() {
            self.order.insert((node.fullness(), node.info.id, at));
        }
    }

    fn count(&mut self, vm: &Placed, domains: [u32; 4], come: bool) {
        let add = |number: &mut u32| {
            *number = if come { number.saturating_add(1) } else { number.saturating_sub(1) };
        };
        for wanted in &vm.groups {
            let Some(shard) = self.groups.get_mut(shard(&vm.project, &wanted.group)) else { continue };
            let shard = Arc::make_mut(shard);
            let key = (vm.project.clone(), wanted.group.clone());
            let group = Arc::make_mut(shard.entry(key.clone()).or_default());
            let mut left = false;
            let of_scopes = Scope::ALL.iter().zip(&mut group.by_scope).zip(&mut group.hard).zip(domains);
            for (((scope, by_domain), hard), domain) in of_scopes {
                let members = by_domain.entry(domain).or_default();
                add(&mut members.all);
                if *scope == wanted.scope && !wanted.soft {
                    add(&mut members.hard);
                    add(hard);
                }
                if *members == Members::default() {
                    by_domain.remove(&domain);
                }
                left |= !by_domain.is_empty();
            }
            if !left {
                shard.remove(&key);
            }
        }
    }
}

/// The groups that a request is a member of.
pub struct Neighbours<'a> {
    groups: Vec<(&'a AntiAffinity, &'a Group)>,
}

impl Neighbours<'_> {
    /// True when a member is too near: by the wish of the request or by the member's own.
    pub fn forbid(&self, domains: [u32; 4]) -> bool {
        self.groups.iter().any(|(wanted, group)| {
            let of_scopes = Scope::ALL.iter().zip(&group.by_scope).zip(group.hard).zip(domains);
            of_scopes.into_iter().any(|(((scope, by_domain), hard), domain)| {
                let ours = *scope == wanted.scope && !wanted.soft;
                (ours || hard > 0)
                    && by_domain.get(&domain).is_some_and(|m| m.hard > 0 || (ours && m.all > 0))
            })
        })
    }

    /// How many members are nearer than they should be, for wishes that are only preferred.
    pub fn crowd(&self, domains: [u32; 4]) -> u32 {
        let of = |(wanted, group): &(&AntiAffinity, &Group)| {
            let of_scopes = Scope::ALL.iter().zip(&group.by_scope).zip(domains);
            let near = of_scopes.into_iter().find(|((scope, _), _)| **scope == wanted.scope);
            near.and_then(|((_, by_domain), domain)| by_domain.get(&domain)).map_or(0, |members| members.all)
        };
        self.groups.iter().filter(|(wanted, _)| wanted.soft).map(of).fold(0, u32::saturating_add)
    }
}
