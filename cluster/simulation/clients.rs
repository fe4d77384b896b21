//! Clients: each asks some node for something, waits for the answer, and notes both. What they ask for is about few things, so that
//! they meet.

use blixard_api::VmId;
use blixard_api::placement::PreemptionPolicy;
use blixard_api::vm::VmSpec;
use blixard_node::raft::{Consensus, ProposeError};
use blixard_node::scheduler::{Data, Decision, Request, cluster, place};
use blixard_node::state::placement::{Departure, VmChange};
use blixard_node::state::{Answer, Command, Outcome, Proposal, Refusal};
use tokio_util::sync::CancellationToken;

use crate::dice::Dice;
use crate::history::{History, ImageOp, Seen, Told, VmOp};
use crate::trace::Trace;
use crate::world::{IMAGE, Running, image};

/// Most VMs of a client that are not deleted: all of them have room on two nodes.
const VMS_MAX: usize = 3;

/// One client.
pub struct Client {
    /// Its number.
    pub number: u64,
    /// The nodes it knows.
    pub running: Running,
    /// What all clients see.
    pub history: History,
    /// What happens.
    pub trace: Trace,
    /// Its choices.
    pub dice: Dice,
    /// Its VMs are large and differ in priority, so that some make room for others.
    pub crowd: Option<Crowd>,
}

/// What VMs are like where there is not room for all of them.
pub struct Crowd(Dice);

impl Crowd {
    /// In some runs, as the seed says. Its numbers are its own.
    pub fn new(seed: u64) -> Option<Self> {
        let mut dice = Dice::new(seed ^ 0x0063_726f_7764_5f5f);
        dice.chance(300).then_some(Self(dice))
    }

    /// The same for another client.
    pub fn fork(&mut self) -> Self {
        Self(self.0.fork())
    }

    /// Makes a VM larger and gives it a priority.
    fn change(&mut self, spec: &mut VmSpec) {
        let Self(dice) = self;
        spec.memory_mib = dice.pick(&[512, 1024, 2048]).unwrap_or(spec.memory_mib);
        spec.placement.priority = dice.pick(&[0, 500, 900]).unwrap_or(spec.placement.priority);
        let policies =
            [PreemptionPolicy::Never, PreemptionPolicy::LowerPriority, PreemptionPolicy::CostAware];
        spec.placement.preemption.policy = dice.pick(&policies).unwrap_or_default();
        spec.placement.preemption.grace_ms = 0;
    }
}

/// What became of a command.
enum Became {
    /// It was applied.
    Applied(Outcome),
    /// It was not.
    Not,
    /// Nobody knows.
    Unknown,
}

struct Owned {
    id: VmId,
    generation: Option<u64>,
}

impl Client {
    /// Asks until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut vms: Vec<Owned> = Vec::new();
        let mut made = 0;
        while !stop.is_cancelled() {
            let pause = self.dice.millis(5..=250);
            tokio::time::sleep(pause).await;
            let nodes = self.running.all();
            let Some((node, alive)) = self.dice.pick(&nodes) else { continue };
            match self.dice.within(0..=9) {
                0..=4 => self.about_an_image(&node, &alive).await,
                5 if vms.len() < VMS_MAX => {
                    made += 1;
                    vms.extend(self.create(&node, &alive, made).await);
                }
                _ => {
                    let last = vms.len().checked_sub(1);
                    let Some(last) = last else { continue };
                    let at = usize::try_from(self.dice.next()).unwrap_or(0) % (last + 1);
                    let Some(vm) = vms.get_mut(at) else { continue };
                    if self.about_a_vm(&node, &alive, vm).await {
                        vms.remove(at);
                    }
                }
            }
        }
    }

    async fn propose(&self, node: &Consensus, alive: &CancellationToken, command: Command) -> Became {
        let proposal = Proposal { now_ms: node.clock().now_ms(), key: None, command };
        // A node that ends while it is asked does not answer.
        match alive.run_until_cancelled(node.propose(proposal)).await {
            Some(Ok((_, outcome))) if !alive.is_cancelled() => Became::Applied(outcome),
            Some(Err(ProposeError::NotLeader { .. } | ProposeError::Level { .. })) => Became::Not,
            _ => Became::Unknown,
        }
    }

    /// The state, with everything in it that was answered before.
    async fn linearize(&self, node: &Consensus, alive: &CancellationToken) -> bool {
        matches!(alive.run_until_cancelled(node.linearize()).await, Some(Ok(()))) && !alive.is_cancelled()
    }

    async fn about_an_image(&mut self, node: &Consensus, alive: &CancellationToken) {
        let name = format!("r{}", self.dice.within(0..=2));
        let begin = self.history.moment();
        let what = self.dice.within(0..=9);
        let (known, op) = match what {
            0..=4 => {
                if !self.linearize(node, alive).await {
                    return;
                }
                let found = node.replica().state().image(&name).map(|image| image.blob.size_bytes);
                (true, ImageOp::Read(found))
            }
            5..=8 => {
                let content = 1000 * self.number + begin * 1_000_000;
                match self.propose(node, alive, image(&name, content)).await {
                    Became::Applied(Ok(_)) => (true, ImageOp::Put(content)),
                    Became::Applied(Err(_)) | Became::Not => return,
                    Became::Unknown => (false, ImageOp::Put(content)),
                }
            }
            _ => match self.propose(node, alive, Command::DeleteImage { name: name.clone() }).await {
                Became::Applied(Ok(_)) => (true, ImageOp::Delete(Some(true))),
                Became::Applied(Err(Refusal::NoImage(_))) => (true, ImageOp::Delete(Some(false))),
                Became::Applied(Err(_)) | Became::Not => return,
                Became::Unknown => (false, ImageOp::Delete(None)),
            },
        };
        self.note(node, &name, known, &op);
        self.history.image(&name, begin, known, op);
    }

    fn note(&self, node: &Consensus, of: &str, known: bool, op: &dyn std::fmt::Debug) {
        let answer = if known { "" } else { ", no answer" };
        self.trace.note(format_args!("client {} at {}: {of} {op:?}{answer}", self.number, node.node()));
    }

    async fn create(&mut self, node: &Consensus, alive: &CancellationToken, made: u64) -> Option<Owned> {
        let id = VmId::from_parts(1_795_000_000_000, u128::from(1000 * self.number + made));
        let restart = self.dice.chance(800);
        let again = self.dice.chance(500);
        let spec = serde_json::json!({
            "image": IMAGE,
            "memory_mib": self.dice.pick(&[256, 512, 1024]),
            "placement": { "on_node_loss": if restart { "restart" } else { "wait" } },
            "restart": { "when": if again { "always" } else { "never" } },
            "health": { "command": if made.is_multiple_of(2) { vec!["true"] } else { vec![] } },
        });
        let mut spec: VmSpec = match serde_json::from_value(spec) {
            Ok(spec) => spec,
            Err(error) => {
                self.trace.wrong(format_args!("a spec: {error}"));
                return None;
            }
        };
        if let Some(crowd) = &mut self.crowd {
            crowd.change(&mut spec);
        }
        let (target, victims) = {
            let state = node.replica().state();
            let request = Request {
                project: "default",
                size: cluster::size(&spec),
                placement: &spec.placement,
                image: None,
                data: Data::Anywhere,
                avoid: &[],
                untold: false,
            };
            match place(state.view(), &request) {
                Decision::Place { node, victims } => (node, victims),
                Decision::Refused(_) => return None,
            }
        };
        let begin = self.history.moment();
        let command = Command::CreateVm {
            id,
            project: "default".into(),
            name: format!("vm-{}-{made}", self.number),
            spec: Box::new(spec),
            node: target,
            waits: !victims.is_empty(),
        };
        let became = self.propose(node, alive, command).await;
        if matches!(became, Became::Applied(Ok(_))) {
            self.preempt(node, alive, &victims).await;
        }
        let (known, told) = self.told(became)?;
        self.note(node, &id.to_string(), known, &VmOp::Create(told));
        self.history.vm(id, begin, known, VmOp::Create(told));
        Some(Owned { id, generation: None })
    }

    /// Asks these VMs to leave, once, as the API does.
    async fn preempt(&self, node: &Consensus, alive: &CancellationToken, victims: &[VmId]) {
        for id in victims {
            let epoch = node.replica().state().vm(*id).map(|vm| vm.epoch);
            let Some(epoch) = epoch else { continue };
            let change = VmChange::Evict { why: Departure::Preempted, grace_ms: 0 };
            self.trace.note(format_args!("client {}: {id} shall make room", self.number));
            self.propose(node, alive, Command::Vm { id: *id, epoch, change }).await;
        }
    }

    /// What a change of a VM means for the history; `None` when it was not made.
    fn told(&self, became: Became) -> Option<(bool, Told)> {
        let told = match became {
            Became::Not => return None,
            Became::Unknown => return Some((false, Told::Nothing)),
            Became::Applied(Ok(Answer::Vm { vm, .. })) => Told::Vm(Seen::new(vm.desired, vm.generation)),
            Became::Applied(Err(Refusal::NoVm)) => Told::NoVm,
            Became::Applied(Err(Refusal::Leaving(_))) => Told::Leaving,
            Became::Applied(Err(Refusal::Generation { now })) => Told::Generation(now),
            // Room, names and the like: nothing was changed.
            Became::Applied(_) => return None,
        };
        Some((true, told))
    }

    /// Answers whether nothing more is to be asked about it.
    async fn about_a_vm(&mut self, node: &Consensus, alive: &CancellationToken, vm: &mut Owned) -> bool {
        let begin = self.history.moment();
        let what = self.dice.within(0..=9);
        let if_generation = vm.generation.filter(|_| self.dice.chance(500));
        let id = vm.id;
        let op = match what {
            0..=4 => {
                if !self.linearize(node, alive).await {
                    return false;
                }
                let state = node.replica().state();
                let seen = state.vm(id).map(|vm| (Seen::new(vm.desired, vm.generation), vm.generation));
                vm.generation = seen.map(|(_, generation)| generation);
                (true, VmOp::Read(seen.map(|(seen, _)| seen)))
            }
            5..=6 => {
                let became = self.propose(node, alive, Command::StartVm { id, if_generation }).await;
                let Some((known, told)) = self.told(became) else { return false };
                (known, VmOp::Start(if_generation, told))
            }
            7..=8 => {
                let command = Command::StopVm { id, grace_ms: 0, if_generation };
                let became = self.propose(node, alive, command).await;
                let Some((known, told)) = self.told(became) else { return false };
                (known, VmOp::Stop(if_generation, told))
            }
            _ => {
                let command = Command::DeleteVm { id, force: true, if_generation: None };
                let became = self.propose(node, alive, command).await;
                let Some((known, told)) = self.told(became) else { return false };
                (known, VmOp::Delete(told))
            }
        };
        let (known, op) = op;
        self.note(node, &id.to_string(), known, &op);
        let deleted = matches!(op, VmOp::Delete(_)) && known;
        self.history.vm(id, begin, known, op);
        deleted
    }

    /// What every node says of everything, at the end.
    pub async fn read_all(&self) {
        for (node, alive) in self.running.all() {
            let begin = self.history.moment();
            if !self.linearize(&node, &alive).await {
                self.trace
                    .wrong(format_args!("{} cannot read although nothing is wrong any more", node.node()));
                continue;
            }
            let (images, vms) = {
                let state = node.replica().state();
                let image = |name: &String| state.image(name).map(|image| image.blob.size_bytes);
                let images: Vec<_> =
                    (0..=2).map(|n| format!("r{n}")).map(|n| (n.clone(), image(&n))).collect();
                let seen = |id: &VmId| state.vm(*id).map(|vm| Seen::new(vm.desired, vm.generation));
                let vms: Vec<_> = self.history.vms().iter().map(|id| (*id, seen(id))).collect();
                (images, vms)
            };
            for (name, found) in images {
                self.history.image(&name, begin, true, ImageOp::Read(found));
            }
            for (id, found) in vms {
                self.history.vm(id, begin, true, VmOp::Read(found));
            }
        }
    }
}
