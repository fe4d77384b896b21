//! Clients: each asks the API of some node for something, waits for the answer, and notes both. What they ask for is about few things,
//! so that they meet. Content of images is not uploaded: what gives it a name is proposed at once.

use axum::http::{Method, StatusCode};
use blixard_api::VmId;
use blixard_api::image::ImageView;
use blixard_api::placement::PreemptionPolicy;
use blixard_api::vm::{VmSpec, VmView};
use blixard_node::raft::ProposeError;
use blixard_node::state::{Command, Outcome, Proposal, Refusal};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::dice::Dice;
use crate::history::{History, ImageOp, Seen, Told, VmOp};
use crate::member::{Ask, Became, Member};
use crate::trace::Trace;
use crate::world::{IMAGE, Running, image};

/// Where VMs are.
const VMS: &str = "/v1/projects/default/vms";
/// How often a request with a key is asked.
const TRIES_MAX: usize = 4;
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
    /// Idempotency keys that it has used.
    pub keys: u64,
}

fn vm_path(name: &str) -> String {
    format!("{VMS}/{name}")
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
enum Proposed {
    /// It was applied.
    Applied(Outcome),
    /// It was not.
    Not,
    /// Nobody knows.
    Unknown,
}

struct Owned {
    id: VmId,
    name: String,
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
            let Some(member) = self.dice.pick(&nodes) else { continue };
            match self.dice.within(0..=9) {
                0..=4 => self.about_an_image(&member).await,
                5 if vms.len() < VMS_MAX => {
                    made += 1;
                    vms.extend(self.create(&member, made).await);
                }
                _ => {
                    let last = vms.len().checked_sub(1);
                    let Some(last) = last else { continue };
                    let at = usize::try_from(self.dice.next()).unwrap_or(0) % (last + 1);
                    let Some(vm) = vms.get_mut(at) else { continue };
                    if self.about_a_vm(&member, vm).await {
                        vms.remove(at);
                    }
                }
            }
        }
    }

    /// Asks for a change. Most requests have a key, and are repeated at other nodes when nobody knows what became of them.
    async fn change(&mut self, first: &Member, mut ask: Ask) -> Became {
        if self.dice.chance(700) {
            self.keys += 1;
            ask.key = Some(format!("{}-{}", self.number, self.keys));
        }
        let mut member = first.clone();
        let mut unknown = false;
        for _ in 0..TRIES_MAX {
            match member.ask(ask.clone(), &self.trace).await {
                // What was asked before may still be done: only its answer says that it was.
                Became::Answered(status, _) if unknown && !status.is_success() => {}
                answered @ Became::Answered(..) => return answered,
                Became::Not => {}
                Became::Unknown => unknown = true,
            }
            if ask.key.is_none() {
                break;
            }
            let pause = self.dice.millis(5..=800);
            tokio::time::sleep(pause).await;
            let nodes = self.running.all();
            member = self.dice.pick(&nodes).unwrap_or(member);
        }
        if unknown { Became::Unknown } else { Became::Not }
    }

    async fn propose(&self, member: &Member, command: Command) -> Proposed {
        let node = &member.consensus;
        let proposal = Proposal { now_ms: node.clock().now_ms(), key: None, command };
        // A node that ends while it is asked does not answer.
        match member.alive.run_until_cancelled(node.propose(proposal)).await {
            Some(Ok((_, outcome))) if !member.alive.is_cancelled() => Proposed::Applied(outcome),
            Some(Err(ProposeError::NotLeader { .. } | ProposeError::Level { .. })) => Proposed::Not,
            _ => Proposed::Unknown,
        }
    }

    async fn about_an_image(&mut self, member: &Member) {
        let name = format!("r{}", self.dice.within(0..=2));
        let begin = self.history.moment();
        let what = self.dice.within(0..=9);
        let (known, op) = match what {
            0..=4 => match self.read_image(member, &name).await {
                Some(found) => (true, ImageOp::Read(found)),
                None => return,
            },
            5..=8 => {
                let content = 1000 * self.number + begin * 1_000_000;
                match self.propose(member, image(&name, content)).await {
                    Proposed::Applied(Ok(_)) => (true, ImageOp::Put(content)),
                    Proposed::Applied(Err(_)) | Proposed::Not => return,
                    Proposed::Unknown => (false, ImageOp::Put(content)),
                }
            }
            _ => match self.propose(member, Command::DeleteImage { name: name.clone() }).await {
                Proposed::Applied(Ok(_)) => (true, ImageOp::Delete(Some(true))),
                Proposed::Applied(Err(Refusal::NoImage(_))) => (true, ImageOp::Delete(Some(false))),
                Proposed::Applied(Err(_)) | Proposed::Not => return,
                Proposed::Unknown => (false, ImageOp::Delete(None)),
            },
        };
        self.note(member, &name, known, &op);
        self.history.image(&name, begin, known, op);
    }

    /// What the name of an image points to; `None` when the node cannot say.
    async fn read_image(&self, member: &Member, name: &str) -> Option<Option<u64>> {
        let became = member.ask(Ask::read(&format!("/v1/images/{name}")), &self.trace).await;
        match became {
            Became::Answered(StatusCode::NOT_FOUND, _) => Some(None),
            found => Some(Some(found.body::<ImageView>(&self.trace)?.size_bytes)),
        }
    }

    /// A VM; `None` when the node cannot say.
    async fn read_vm(&self, member: &Member, name: &str) -> Option<Option<Seen>> {
        let became = member.ask(Ask::read(&vm_path(name)), &self.trace).await;
        match became {
            Became::Answered(StatusCode::NOT_FOUND, _) => Some(None),
            found => {
                let vm = found.body::<VmView>(&self.trace)?;
                Some(Some(Seen::new(vm.desired, vm.generation)))
            }
        }
    }

    fn note(&self, member: &Member, of: &str, known: bool, op: &dyn std::fmt::Debug) {
        let answer = if known { "" } else { ", no answer" };
        let at = member.consensus.node();
        self.trace.note(format_args!("client {} at {at}: {of} {op:?}{answer}", self.number));
    }

    async fn create(&mut self, member: &Member, made: u64) -> Option<Owned> {
        let id = VmId::from_parts(1_795_000_000_000, u128::from(1000 * self.number + made));
        let restart = self.dice.chance(800);
        let again = self.dice.chance(500);
        let spec = json!({
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
        let name = format!("vm-{}-{made}", self.number);
        let begin = self.history.moment();
        let ask = Ask::new(Method::POST, VMS).with(json!({ "id": id, "name": name, "spec": spec }));
        let became = self.change(member, ask).await;
        let (known, told) = self.told(became)?;
        if matches!(told, Told::NoVm | Told::Leaving | Told::Generation(_)) {
            self.trace.wrong(format_args!("{name} cannot be made: {told:?}"));
            return None;
        }
        self.note(member, &name, known, &VmOp::Create(told));
        self.history.vm(id, &name, begin, known, VmOp::Create(told));
        Some(Owned { id, name, generation: None })
    }

    /// What a change of a VM means for the history; `None` when it was not made.
    fn told(&self, became: Became) -> Option<(bool, Told)> {
        let told = match &became {
            Became::Not => return None,
            Became::Unknown => return Some((false, Told::Nothing)),
            Became::Answered(StatusCode::NOT_FOUND, _) => Told::NoVm,
            Became::Answered(StatusCode::CONFLICT, _) => Told::Leaving,
            Became::Answered(StatusCode::PRECONDITION_FAILED, body) => {
                let message = body.get("message").and_then(|message| message.as_str()).unwrap_or_default();
                let now = message.rsplit(' ').next().and_then(|word| word.parse().ok());
                if now.is_none() {
                    self.trace.wrong(format_args!("no generation is told: {body}"));
                }
                Told::Generation(now?)
            }
            // No room, or a node that does not know the image yet: nothing was changed.
            Became::Answered(status, _) if !status.is_success() => return None,
            answered => {
                let vm = answered.body::<VmView>(&self.trace)?;
                Told::Vm(Seen::new(vm.desired, vm.generation))
            }
        };
        Some((true, told))
    }

    /// Answers whether nothing more is to be asked about it.
    async fn about_a_vm(&mut self, member: &Member, vm: &mut Owned) -> bool {
        let begin = self.history.moment();
        let what = self.dice.within(0..=9);
        let if_generation = vm.generation.filter(|_| self.dice.chance(500));
        let id = vm.id;
        // Either names it.
        let word = if self.dice.chance(500) { vm.name.clone() } else { id.to_string() };
        let path = vm_path(&word);
        let verb = |verb| Ask { if_generation, ..Ask::new(Method::POST, format!("{path}:{verb}")) };
        let (known, op) = match what {
            0..=4 => {
                let Some(seen) = self.read_vm(member, &word).await else { return false };
                vm.generation = seen.map(Seen::generation);
                (true, VmOp::Read(seen))
            }
            5..=6 => {
                let became = self.change(member, verb("start")).await;
                let Some((known, told)) = self.told(became) else { return false };
                (known, VmOp::Start(if_generation, told))
            }
            7..=8 => {
                let stop = verb("stop").with(json!({ "grace_ms": 0 }));
                let became = self.change(member, stop).await;
                let Some((known, told)) = self.told(became) else { return false };
                (known, VmOp::Stop(if_generation, told))
            }
            _ => {
                let delete = Ask::new(Method::DELETE, format!("{path}?force=true"));
                let became = self.change(member, delete).await;
                let Some((known, told)) = self.told(became) else { return false };
                (known, VmOp::Delete(told))
            }
        };
        self.note(member, &vm.name, known, &op);
        let deleted = matches!(op, VmOp::Delete(_)) && known;
        self.history.vm(id, &vm.name, begin, known, op);
        deleted
    }

    /// What every node says of everything, at the end.
    pub async fn read_all(&self) {
        for member in self.running.all() {
            let cannot = || {
                let node = member.consensus.node();
                self.trace.wrong(format_args!("{node} cannot read although nothing is wrong any more"));
            };
            for name in (0..=2).map(|n| format!("r{n}")) {
                let begin = self.history.moment();
                match self.read_image(&member, &name).await {
                    Some(found) => self.history.image(&name, begin, true, ImageOp::Read(found)),
                    None => return cannot(),
                }
            }
            for (id, name) in self.history.vms() {
                let begin = self.history.moment();
                match self.read_vm(&member, &name).await {
                    Some(found) => self.history.vm(id, &name, begin, true, VmOp::Read(found)),
                    None => return cannot(),
                }
            }
        }
    }
}
