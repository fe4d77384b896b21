//! Command by command: what it changes, or why it is refused.

use std::sync::Arc;

use blixard_api::VmId;
use blixard_api::vm::{Desired, Phase, VmSpec, grace_default};
use blixard_vmm_api::health::HealthState;

use super::address::{HostRange, nic};
use super::command::{Answer, Command, Outcome, Proposal, Refusal};
use super::placement::{Departure, Leaving, Upkeep};
use super::records::{
    ClusterRecord, LEASES_MS, NetworkRecord, NicRecord, NodeId, NodeRecord, Observed, Pins, VmRecord,
};
use super::{ANSWER_KEPT_MS, ANSWERS_MAX, KeptAnswer, NODE_VMS_MAX, RecordKey, State, VMS_MAX, workload};
use crate::scheduler::cluster;

/// Most names that a refusal lists.
const NAMED_MAX: usize = 5;

impl State {
    /// Notes that the log has been applied up to `revision` by an entry without a command.
    pub fn advance(&mut self, revision: u64) {
        self.revision = self.revision.max(revision);
    }

    /// Applies the command of the log entry with this index.
    pub fn apply(&mut self, revision: u64, proposal: &Proposal) -> Outcome {
        self.advance(revision);
        if let Some(key) = &proposal.key {
            self.forget_old_answers(proposal.now_ms);
            if let Some(kept) = self.answers.get(&key.text) {
                return if kept.fingerprint == key.fingerprint {
                    Ok(kept.answer.clone())
                } else {
                    Err(Refusal::KeyReused)
                };
            }
        }
        let outcome = self.run(&proposal.command, proposal.now_ms);
        // A refusal has changed nothing, so asking again may do better and is no repetition.
        if let (Some(key), Ok(answer)) = (&proposal.key, &outcome) {
            let kept = KeptAnswer {
                key: key.text.clone(),
                fingerprint: key.fingerprint,
                at_ms: proposal.now_ms,
                revision,
                answer: answer.clone(),
            };
            self.changed.insert(RecordKey::Answer(key.text.clone()));
            self.answer_ages.insert(revision, key.text.clone());
            self.answers.insert(key.text.clone(), Arc::new(kept));
        }
        #[cfg(debug_assertions)]
        super::invariants::assert_all(self);
        outcome
    }

    fn forget_old_answers(&mut self, now_ms: u64) {
        while let Some((revision, key)) = self.answer_ages.first_key_value() {
            let expired =
                self.answers.get(key).is_none_or(|kept| kept.at_ms.saturating_add(ANSWER_KEPT_MS) <= now_ms);
            if !expired && self.answers.len() < ANSWERS_MAX {
                break;
            }
            let (revision, key) = (*revision, key.clone());
            self.answer_ages.remove(&revision);
            self.answers.remove(&key);
            self.changed.insert(RecordKey::Answer(key));
        }
    }

    fn run(&mut self, command: &Command, now_ms: u64) -> Outcome {
        match command {
            Command::InitCluster { feature_level, network, node, node_name, lease_ms } => {
                let first = ClusterRecord {
                    feature_level: *feature_level,
                    created_at_ms: now_ms,
                    // 4096 revisions per millisecond of cluster life are never reached, and 2^53 is not passed before the year 2039.
                    plan_base: now_ms.saturating_mul(REVISIONS_PER_MS),
                    next_node: node.saturating_add(1),
                    lease_ms: (*lease_ms).clamp(*LEASES_MS.start(), *LEASES_MS.end()),
                };
                self.init(first, network, *node, node_name)
            }
            Command::RenameNode { node, name } => {
                let record = self.nodes.get_mut(node).ok_or(Refusal::NoNode(*node))?;
                if record.name != *name {
                    Arc::make_mut(record).name.clone_from(name);
                    self.view.set_node(cluster::node_info(record));
                    self.changed.insert(RecordKey::Node(*node));
                }
                Ok(Answer::Done)
            }
            Command::CreateVm { id, project, name, spec, node, waits } => {
                let place = Place { node: *node, waits: *waits };
                self.create_vm(*id, project, name, spec, place, now_ms)
            }
            Command::StartVm { id, if_generation } => self.start_vm(*id, *if_generation),
            Command::StopVm { id, grace_ms, if_generation } => self.stop_vm(*id, *grace_ms, *if_generation),
            Command::DeleteVm { id, force, if_generation } => self.delete_vm(*id, *force, *if_generation),
            Command::ForgetVm { id, epoch } => {
                let known = self.vms.get(id).filter(|vm| vm.desired == Desired::Gone && vm.epoch == *epoch);
                if let Some(vm) = known.cloned() {
                    self.unindex(&vm);
                    self.vms.remove(id);
                    self.changed.insert(RecordKey::Vm(*id));
                }
                Ok(Answer::Done)
            }
            Command::RecordReport { id, node, epoch, observed } => {
                self.record_report(*id, *node, *epoch, observed);
                Ok(Answer::Done)
            }
            Command::PutImage(image) => {
                let image = Arc::new(image.as_ref().clone());
                self.images.insert(image.name.clone(), Arc::clone(&image));
                self.changed.insert(RecordKey::Image(image.name.clone()));
                self.touch_all_plans();
                Ok(Answer::Image(image))
            }
            Command::DeleteImage { name } => {
                let image = self.image(name).cloned().ok_or_else(|| Refusal::NoImage(name.clone()))?;
                self.check_unused(|vm| vm.pins.image.digest == image.blob.digest)?;
                self.images.remove(&image.name);
                self.changed.insert(RecordKey::Image(image.name.clone()));
                self.touch_all_plans();
                Ok(Answer::Image(image))
            }
            Command::PutKernel(kernel) => {
                let kernel = Arc::new(kernel.as_ref().clone());
                self.kernels.insert(kernel.name.clone(), Arc::clone(&kernel));
                self.changed.insert(RecordKey::Kernel(kernel.name.clone()));
                self.touch_all_plans();
                Ok(Answer::Kernel(kernel))
            }
            Command::DeleteKernel { name } => {
                let kernel =
                    self.kernels.get(name).cloned().ok_or_else(|| Refusal::NoKernel(name.clone()))?;
                self.check_unused(|vm| vm.pins.initramfs.digest == kernel.initramfs.digest)?;
                self.kernels.remove(name);
                self.changed.insert(RecordKey::Kernel(name.clone()));
                self.touch_all_plans();
                Ok(Answer::Kernel(kernel))
            }
            Command::Member(command) => self.run_member(command, now_ms),
            Command::Node { node, change } => self.change_node(*node, change, now_ms),
            Command::Vm { id, epoch, change } => self.change_vm(*id, *epoch, change, now_ms),
        }
    }

    fn init(
        &mut self,
        first: ClusterRecord,
        network: &NetworkRecord,
        node: NodeId,
        node_name: &str,
    ) -> Outcome {
        if self.cluster.is_some() {
            return Err(Refusal::Initialised);
        }
        let feature_level = first.feature_level;
        self.cluster = Some(Arc::new(first));
        self.changed.insert(RecordKey::Cluster);
        self.networks.insert(network.name.clone(), Arc::new(network.clone()));
        self.changed.insert(RecordKey::Network(network.name.clone()));
        let mut record = NodeRecord::new(node, node_name);
        record.feature_level = feature_level;
        self.view.set_node(cluster::node_info(&record));
        self.nodes.insert(node, Arc::new(record));
        self.touch_plan(node);
        Ok(Answer::Done)
    }

    fn create_vm(
        &mut self,
        id: VmId,
        project: &str,
        name: &str,
        spec: &VmSpec,
        place: Place,
        now_ms: u64,
    ) -> Outcome {
        let Place { node, waits } = place;
        if let Some(vm) = self.vms.get(&id) {
            let same =
                vm.project == project && vm.name == name && vm.spec == *spec && vm.desired != Desired::Gone;
            return if same {
                Ok(Answer::Vm { vm: Arc::clone(vm), created: false })
            } else {
                Err(Refusal::IdTaken(id))
            };
        }
        if let Some(vm) = self.vm_named(project, name) {
            return Err(Refusal::NameTaken { name: name.to_owned(), id: vm.id });
        }
        // Below this level every member applies what the first versions did.
        let most = if self.places() { VMS_MAX } else { NODE_VMS_MAX };
        if self.vms.len() >= most {
            return Err(Refusal::TooMany(most));
        }
        if !self.nodes.contains_key(&node) {
            return Err(Refusal::NoNode(node));
        }
        let image = self.image(&spec.image).cloned().ok_or_else(|| Refusal::NoImage(spec.image.clone()))?;
        let kernel_name = spec.kernel.as_deref().unwrap_or(DEFAULT_KERNEL);
        let kernel = self
            .kernels
            .get(kernel_name)
            .cloned()
            .ok_or_else(|| Refusal::NoKernel(kernel_name.to_owned()))?;
        let mut vm = VmRecord {
            id,
            project: project.to_owned(),
            name: name.to_owned(),
            spec: spec.clone(),
            pins: Pins {
                image: image.blob,
                image_fs: image.fs.clone(),
                kernel: kernel.kernel,
                initramfs: kernel.initramfs,
            },
            workload: workload::effective(&image.config, spec),
            health: workload::health(&image.config, spec),
            nic: None,
            generation: 1,
            created_at_ms: now_ms,
            desired: Desired::Running,
            grace_ms: grace_default(),
            start: 1,
            node,
            epoch: 1,
            unlisted_since: 0,
            observed: Observed::nothing(0),
            upkeep: Upkeep::default(),
        };
        if waits {
            let leaving = Leaving { why: Departure::Waiting, grace_ms: 0, released: true };
            vm.upkeep.leaving = Some(leaving);
            vm.unlisted_since = 1;
        } else {
            self.has_room(&vm, node)?;
        }
        vm.nic = self.attach(spec)?;
        self.index(&vm);
        self.touch_plan(node);
        let vm = self.put_vm(vm);
        Ok(Answer::Vm { vm, created: true })
    }

    fn attach(&mut self, spec: &VmSpec) -> Result<Option<NicRecord>, Refusal> {
        let name = spec.network.as_deref().unwrap_or(DEFAULT_NETWORK);
        if name == NO_NETWORK {
            return Ok(None);
        }
        let network = self.networks.get(name).ok_or_else(|| Refusal::NoNetwork(name.to_owned()))?;
        let full = || Refusal::NetworkFull(name.to_owned());
        let taken = self.hosts.get(name);
        let range = HostRange::of(network).ok_or_else(full)?;
        let host = range
            .free(network.next_host, |host| taken.is_some_and(|t| t.contains_key(&host)))
            .ok_or_else(full)?;
        let attached = nic(network, host).ok_or_else(full)?;
        if let Some(network) = self.networks.get_mut(name) {
            Arc::make_mut(network).next_host = host.saturating_add(1);
        }
        self.changed.insert(RecordKey::Network(name.to_owned()));
        Ok(Some(attached))
    }

    /// The VM, when it may be changed by somebody who knows it with this generation.
    fn changeable(&self, id: VmId, if_generation: Option<u64>) -> Result<VmRecord, Refusal> {
        let vm = self.vms.get(&id).ok_or(Refusal::NoVm)?;
        match if_generation {
            Some(wanted) if wanted != vm.generation => Err(Refusal::Generation { now: vm.generation }),
            _ => Ok(vm.as_ref().clone()),
        }
    }

    fn start_vm(&mut self, id: VmId, if_generation: Option<u64>) -> Outcome {
        let mut vm = self.changeable(id, if_generation)?;
        if vm.desired == Desired::Gone {
            return Err(Refusal::Leaving(vm.name));
        }
        if vm.desired == Desired::Stopped || vm.has_ended() {
            if vm.has_ended() && vm.unlisted_since == 0 && self.places() {
                self.has_room_again(&vm)?;
            }
            vm.upkeep.restarts = 0;
            vm.upkeep.avoid.clear();
            vm.upkeep.unhealthy_starts = 0;
            vm.desired = Desired::Running;
            vm.start = vm.start.saturating_add(1);
            vm.generation = vm.generation.saturating_add(1);
            vm.observed = Observed::nothing(vm.observed.start);
            self.touch_plan(vm.node);
            return Ok(Answer::Vm { vm: self.put_vm(vm), created: false });
        }
        Ok(Answer::Vm { vm: Arc::new(vm), created: false })
    }

    fn stop_vm(&mut self, id: VmId, grace_ms: u64, if_generation: Option<u64>) -> Outcome {
        let mut vm = self.changeable(id, if_generation)?;
        if vm.desired == Desired::Gone {
            return Err(Refusal::Leaving(vm.name));
        }
        if vm.desired != Desired::Stopped || (vm.grace_ms != grace_ms && !vm.has_ended()) {
            vm.desired = Desired::Stopped;
            vm.grace_ms = grace_ms;
            if vm.unlisted_since > 0 {
                // It has no node on which it could stop.
                vm.observed = Observed { phase: Phase::Stopped, ..Observed::nothing(vm.start) };
            }
            vm.generation = vm.generation.saturating_add(1);
            self.touch_plan(vm.node);
            return Ok(Answer::Vm { vm: self.put_vm(vm), created: false });
        }
        Ok(Answer::Vm { vm: Arc::new(vm), created: false })
    }

    fn delete_vm(&mut self, id: VmId, force: bool, if_generation: Option<u64>) -> Outcome {
        let mut vm = self.changeable(id, if_generation)?;
        if vm.desired == Desired::Gone {
            return Ok(Answer::Vm { vm: Arc::new(vm), created: false });
        }
        if !force && !vm.has_ended() {
            return Err(Refusal::Runs(vm.name));
        }
        if vm.unlisted_since > 0 {
            // It was off the plan before: nothing of it runs.
            vm.observed = Observed { phase: Phase::Stopped, ..Observed::nothing(vm.start) };
        }
        vm.desired = Desired::Gone;
        vm.generation = vm.generation.saturating_add(1);
        vm.unlisted_since = self.touch_plan(vm.node);
        Ok(Answer::Vm { vm: self.put_vm(vm), created: false })
    }

    fn record_report(&mut self, id: VmId, node: NodeId, epoch: u64, observed: &Observed) {
        let Some(vm) = self.vms.get(&id) else { return };
        let off_plan = vm.unlisted_since > 0 && vm.desired != Desired::Gone;
        // What has ended does not run again in the same start, whatever was late on its way: its room may be another's.
        let late =
            self.places() && vm.has_ended() && !matches!(observed.phase, Phase::Stopped | Phase::Failed);
        let other = vm.node != node || vm.epoch != epoch || off_plan || late;
        if other || vm.observed == *observed || !vm.is_news(observed) {
            return;
        }
        let mut vm = vm.as_ref().clone();
        vm.observed = observed.clone();
        if observed.health.as_ref().is_some_and(|health| health.state == HealthState::Healthy) {
            vm.upkeep.unhealthy_starts = 0;
        }
        self.note_departure(&mut vm);
        self.put_vm(vm);
    }

    fn check_unused(&self, uses: impl Fn(&VmRecord) -> bool) -> Result<(), Refusal> {
        let mut users = self.vms.values().filter(|vm| uses(vm));
        let vms: Vec<String> = users.by_ref().take(NAMED_MAX).map(|vm| vm.name.clone()).collect();
        if vms.is_empty() { Ok(()) } else { Err(Refusal::InUse { vms, more: users.count() }) }
    }

    pub(super) fn put_vm(&mut self, vm: VmRecord) -> Arc<VmRecord> {
        let vm = Arc::new(vm);
        let keeps = self.keeps_room();
        cluster::put(&mut self.view, &vm, keeps);
        self.changed.insert(RecordKey::Vm(vm.id));
        self.vms.insert(vm.id, Arc::clone(&vm));
        vm
    }

    /// The plan of this node is another one from this revision on; answers its generation.
    pub(super) fn touch_plan(&mut self, node: NodeId) -> u64 {
        let own = self.nodes.get(&node).map_or(0, |record| record.plan_base);
        let base = self.cluster.as_ref().map_or(0, |cluster| cluster.plan_base).max(own);
        let generation = base.saturating_add(self.revision);
        if let Some(record) = self.nodes.get_mut(&node) {
            Arc::make_mut(record).plan_generation = generation;
            self.changed.insert(RecordKey::Node(node));
        }
        generation
    }

    fn touch_all_plans(&mut self) {
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        for node in nodes {
            self.touch_plan(node);
        }
    }
}

/// More revisions than a millisecond of a cluster's life ever has.
pub(super) const REVISIONS_PER_MS: u64 = 4096;

/// Where a new VM goes.
#[derive(Clone, Copy)]
struct Place {
    node: NodeId,
    waits: bool,
}

/// Name of the kernel of VMs that name none.
pub const DEFAULT_KERNEL: &str = "default";
/// Name of the network of VMs that name none.
pub const DEFAULT_NETWORK: &str = "default";
/// What a VM without a nic names as its network.
pub const NO_NETWORK: &str = "none";

#[cfg(test)]
#[path = "apply_test.rs"]
mod tests;
