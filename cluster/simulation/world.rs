//! The simulated cluster: hosts with their nodes, which are started, ended and started again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blixard_agent_api::{BlobRef, Digest};
use blixard_api::image::ImageConfig;
use blixard_netd_api::Subnet;
use blixard_node::node::feature_level;
use blixard_node::state::records::LEASE_MS;
use blixard_node::state::{
    Answer, Command, ImageRecord, JoinTokenRecord, KernelRecord, MemberCommand, NetworkRecord, NodeFacts,
    NodeId, Proposal,
};
use futures::FutureExt;
use tokio::time::Instant;

use crate::census::Census;
use crate::clock::HostClock;
use crate::dice::Dice;
use crate::disk::Disk;
use crate::host::Host;
use crate::member::Member;
use crate::network::Network;
use crate::node::{Machine, Node};
use crate::trace::Trace;

/// Longest time that a node takes to start, or the cluster to be formed.
const START_MAX: Duration = Duration::from_secs(20);
/// Clocks differ by at most 1.8 %; the cluster allows 2 %.
const FAST_PPM_MAX: u64 = 9_000;
/// The image that VMs are made of.
pub const IMAGE: &str = "img";

/// A node with what it runs on.
pub struct Place {
    /// What it runs on.
    pub machine: Machine,
    /// It runs.
    pub node: Option<Node>,
    /// How often it was started.
    pub runs: u64,
    /// When it is started again.
    pub again: Option<Instant>,
    /// Its host has power.
    pub powered: bool,
    /// It was taken out of the cluster.
    pub removed: bool,
    /// A state of this revision or a later one that does not know it is one of a cluster that it has left.
    pub since: u64,
}

/// The nodes that run now, for clients.
#[derive(Clone, Default)]
pub struct Running(Arc<Mutex<BTreeMap<NodeId, Member>>>);

impl Running {
    fn map(&self) -> MutexGuard<'_, BTreeMap<NodeId, Member>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    pub fn all(&self) -> Vec<Member> {
        self.map().values().cloned().collect()
    }

    /// The one with this number.
    pub fn get(&self, node: NodeId) -> Option<Member> {
        self.map().get(&node).cloned()
    }
}

/// The cluster.
pub struct World {
    /// Nodes by number.
    pub places: BTreeMap<NodeId, Place>,
    /// The network.
    pub network: Network,
    /// What runs where.
    pub census: Census,
    /// What happens.
    pub trace: Trace,
    /// The nodes that run now.
    pub running: Running,
    dice: Dice,
    folder: PathBuf,
    tokens: u64,
}

/// Content that is nowhere.
pub fn blob(number: u64) -> BlobRef {
    let mut bytes = [0; 32];
    bytes.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
    BlobRef { digest: Digest::from_bytes(bytes), size_bytes: number }
}

/// An image with this content.
pub fn image(name: &str, number: u64) -> Command {
    Command::PutImage(Box::new(ImageRecord {
        name: name.into(),
        blob: blob(number),
        fs: "erofs".into(),
        created_at_ms: 1,
        config: ImageConfig { command: vec!["/bin/sh".into()], ..ImageConfig::default() },
    }))
}

fn facts(node: NodeId) -> Box<NodeFacts> {
    Box::new(NodeFacts {
        name: format!("n{node}"),
        address: Some(std::net::SocketAddr::from(([10, 0, 0, 1], 9000))),
        public_key: Some(format!("key of {node}")),
        labels: BTreeMap::new(),
        version: "simulated".into(),
        feature_level: feature_level(),
        trust_version: 1,
    })
}

impl World {
    /// A world without nodes. `folder` is one of the real host, for what is never used.
    pub fn new(mut dice: Dice, trace: Trace, folder: PathBuf) -> Self {
        let twice = dice.pick(&[0, 20, 100]).unwrap_or(0);
        let network = Network::new(dice.fork(), trace.clone(), twice);
        let census = Census::new(trace.clone());
        let (places, running) = (BTreeMap::new(), Running::default());
        Self { places, network, census, trace, running, dice, folder, tokens: 0 }
    }

    /// A host for this node, which is a member since this revision.
    pub fn add_place(&mut self, node: NodeId, since: u64) {
        let fast = i64::try_from(self.dice.within(0..=2 * FAST_PPM_MAX)).unwrap_or(0);
        let clock = Arc::new(HostClock::new(fast - i64::try_from(FAST_PPM_MAX).unwrap_or(0)));
        let host = Host::new(node, clock, self.dice.fork(), self.census.clone(), self.trace.clone());
        let disk = Disk::new(self.dice.fork());
        let machine = Machine { host, disk, network: self.network.clone(), trace: self.trace.clone() };
        let place = Place { machine, node: None, runs: 0, again: None, powered: true, removed: false, since };
        self.places.insert(node, place);
    }

    /// Starts a node. One whose disk is full or broken may fail to start; it is tried again.
    pub async fn start(&mut self, node: NodeId, founder: bool) {
        let Some(place) = self.places.get_mut(&node) else { return };
        place.runs += 1;
        place.again = None;
        if !place.powered {
            place.powered = true;
            place.machine.host.boot();
            self.trace.note(format_args!("{node} boots"));
        }
        self.trace.note(format_args!("{node} starts"));
        let run = (node, place.runs);
        let started = Node::start(&place.machine, run, founder, &self.folder);
        match tokio::time::timeout(START_MAX, started).await {
            Ok(Ok(started)) => {
                let consensus = &started.member.consensus;
                let (numbers, voters) = (consensus.numbers(), consensus.electorate());
                self.trace.note(format_args!("{node} runs: {numbers:?}, {voters:?}"));
                self.running.map().insert(node, started.member.clone());
                place.node = Some(started);
            }
            Ok(Err(error)) if place.machine.disk.has_refused() => {
                self.trace.note(format_args!("{node} cannot start: {error}"));
                place.again = Some(Instant::now() + Duration::from_secs(1));
            }
            Ok(Err(error)) => {
                let why = blixard_node::host::chain(&error);
                self.trace.wrong(format_args!("{node} cannot start: {why}"));
            }
            Err(_) => self.trace.wrong(format_args!("{node} does not start in time")),
        }
    }

    /// Ends a node, or with `dark` its whole host; it comes back after this time.
    pub fn kill(&mut self, node: NodeId, dark: bool, back: Duration) {
        let Some(place) = self.places.get_mut(&node) else { return };
        let Some(killed) = place.node.take() else { return };
        self.trace.note(format_args!("{node} dies, {}", if dark { "without power" } else { "alone" }));
        self.running.map().remove(&node);
        killed.kill(&self.network, dark);
        if dark {
            place.machine.disk.lose_power();
            place.machine.host.lose_power();
            place.powered = false;
        }
        place.again = Some(Instant::now() + back);
    }

    /// Nodes that ended by themselves, and those whose time has come, are started again.
    pub async fn supervise(&mut self) {
        let mut ended = Vec::new();
        for (node, place) in &self.places {
            let Some(running) = &place.node else { continue };
            if let Some(reason) = running.member.consensus.stopped().now_or_never() {
                ended.push(*node);
                self.trace.note(format_args!("{node} stops: {reason}"));
                if !place.machine.disk.has_refused() {
                    self.trace.wrong(format_args!("consensus of {node} stops for no reason: {reason}"));
                }
            }
        }
        for node in ended {
            self.kill(node, false, Duration::from_millis(500));
        }
        let due = |place: &Place| !place.removed && place.again.is_some_and(|at| at <= Instant::now());
        let due: Vec<NodeId> =
            self.places.iter().filter(|(_, place)| due(place)).map(|(node, _)| *node).collect();
        for node in due {
            self.start(node, false).await;
        }
    }

    /// Some member that runs.
    pub fn some(&self) -> Option<Member> {
        let mut members = self.places.iter().filter(|(_, place)| !place.removed);
        members.find_map(|(node, _)| self.running.get(*node))
    }

    /// Proposes through some node that runs.
    ///
    /// # Errors
    /// Why not.
    pub async fn propose(&self, command: Command) -> Result<Answer, String> {
        let consensus = self.some().ok_or("no node runs")?.consensus;
        let proposal = Proposal { now_ms: consensus.clock().now_ms(), key: None, command };
        let (_, outcome) = consensus.propose(proposal).await.map_err(|error| error.to_string())?;
        outcome.map_err(|refusal| refusal.to_string())
    }

    /// Makes the cluster with its first node.
    ///
    /// # Errors
    /// Why not.
    pub async fn found(&mut self) -> Result<(), String> {
        self.add_place(1, 0);
        self.start(1, true).await;
        let consensus = self.running.get(1).ok_or("the first node does not run")?.consensus;
        consensus.recovered().await.map_err(|error| error.to_string())?;
        let subnet = |gateway: &str, prefix| {
            Ok::<_, String>(Subnet { gateway: gateway.parse().map_err(|_| "an address")?, prefix })
        };
        let network = NetworkRecord {
            name: "default".into(),
            v4: subnet("10.88.0.1", 24)?,
            v6: subnet("fd62:1::1", 64)?,
            nat: true,
            mtu: 1500,
            next_host: 2,
        };
        let kernel = KernelRecord {
            name: "default".into(),
            release: "6.1.0".into(),
            kernel: blob(2),
            initramfs: blob(3),
            modules: vec![],
            created_at_ms: 1,
        };
        let init = Command::InitCluster {
            feature_level: feature_level(),
            network,
            node: 1,
            node_name: "n1".into(),
            lease_ms: LEASE_MS,
        };
        self.propose(init).await?;
        self.propose(Command::Member(Box::new(MemberCommand::Announce { node: 1, facts: facts(1) }))).await?;
        let since = consensus.replica().state().revision();
        self.places.entry(1).and_modify(|place| place.since = since);
        self.propose(image(IMAGE, 1)).await?;
        self.propose(Command::PutKernel(Box::new(kernel))).await?;
        Ok(())
    }

    /// Another node joins.
    ///
    /// # Errors
    /// Why not.
    pub async fn join(&mut self) -> Result<NodeId, String> {
        let node = self.admit().await?;
        self.start(node, false).await;
        Ok(node)
    }

    /// Another node is admitted, and has yet to start.
    ///
    /// # Errors
    /// Why not.
    pub async fn admit(&mut self) -> Result<NodeId, String> {
        self.tokens += 1;
        let sha256 = format!("token {}", self.tokens);
        let token = JoinTokenRecord { sha256: sha256.clone(), created_at_ms: 0, expires_at_ms: u64::MAX };
        self.propose(Command::Member(Box::new(MemberCommand::PutJoinToken(token)))).await?;
        let number = self.places.keys().next_back().map_or(1, |last| last + 1);
        let mut facts = facts(number);
        facts.name = format!("n{number}-{}", self.tokens);
        let join = MemberCommand::Join { token: sha256, facts };
        let Answer::Node(record) = self.propose(Command::Member(Box::new(join))).await? else {
            return Err("no node is answered".into());
        };
        let newest =
            self.running.all().into_iter().map(|member| member.consensus.replica().state().revision()).max();
        self.add_place(record.id, newest.unwrap_or(0));
        Ok(record.id)
    }

    /// Waits until all nodes are members with what they have, and enough of them vote.
    pub async fn formed(&mut self) {
        let until = Instant::now() + START_MAX * u32::try_from(self.places.len() / 25 + 1).unwrap_or(1);
        loop {
            let consensus = match self.running.all().into_iter().next() {
                Some(first) => first.consensus,
                None => return self.trace.wrong("nobody runs"),
            };
            let nodes = self.places.len();
            let voters: BTreeSet<NodeId> = consensus.standing().0;
            let wanted = if nodes.is_multiple_of(2) { nodes - 1 } else { nodes }.min(5);
            let told =
                consensus.replica().state().nodes().filter(|node| node.offer.capacity.is_some()).count();
            if voters.len() == wanted && told == nodes {
                return self.trace.note("formed");
            }
            if Instant::now() > until {
                return self.trace.wrong(format_args!("not formed: {voters:?} vote, {told} of {nodes} tell"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
