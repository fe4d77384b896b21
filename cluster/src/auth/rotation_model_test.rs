//! Every order of events of a change of the authority, with what really decides: `State::apply`, the keeper's choice of keys and of
//! the next step, certificates and handshakes of TLS. Nodes lag behind the log, one joins in the middle of it, one crashes
//! between two files of its identity and applies its log anew. Whatever happens, any two nodes can talk to each other; when
//! nothing is left to do all follow the new authority, and the old one is worth nothing.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection};

use super::authority::{NODE_VALID, begin, certify, make, node_name};
use super::identity::{Identity, Keys, new_key};
use super::keeper::{followed, next_trust, renewed};
use super::tls::{Tls, node_of};
use crate::clock;
use crate::node::feature_level;
use crate::state::testing::init;
use crate::state::{
    Command, JoinTokenRecord, MemberCommand, NodeFacts, NodeId, Proposal, State, TrustRecord,
};

/// Node that leads: it has all of the log, and applies it when it likes.
const LEADER: NodeId = 1;
/// Node that is there from the beginning.
const SECOND: NodeId = 2;
/// Node that joins during the change.
const THIRD: NodeId = 3;

/// What happens besides the change itself.
#[derive(Clone, Copy)]
struct Story {
    /// The second node crashes so often.
    crashes: u8,
    /// The third node joins.
    joins: bool,
    /// The leader waits until all nodes follow.
    waits: bool,
    /// A node never goes back to a trust that is over.
    remembers: bool,
}

/// An authority file and a certificate file, by number, and the version beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Files {
    authorities: usize,
    certificate: usize,
    version: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Node {
    /// How much of the log it has applied.
    applied: usize,
    /// How much of it is on its disk.
    received: usize,
    /// Keys in use.
    memory: Files,
    disk: Files,
    /// Keys that are being stored, and how many of the files are.
    storing: Option<(Files, u8)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    /// Number of the state after each entry.
    log: Vec<usize>,
    /// Members that run, and what they have.
    nodes: Vec<(NodeId, Node)>,
    /// What was answered to the third node and is on its way.
    admission: Option<Files>,
    crashes: u8,
}

/// A command that the model appends: there is one of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    SetTrust(u64),
    Announce(NodeId, u64),
    Join,
}

/// States, texts and handshakes that were seen, so that each is made once.
struct Explorer {
    story: Story,
    states: Vec<State>,
    known: HashMap<Vec<u8>, usize>,
    texts: Vec<String>,
    keys: HashMap<NodeId, (String, String)>,
    talks: HashMap<(NodeId, Files, NodeId, Files), bool>,
    /// What a node is given by a version of the trust.
    given: HashMap<(NodeId, u64), Files>,
    /// What a node with these files does at this version: keys to store, and the version that it says it follows.
    choices: HashMap<(NodeId, Files, u64), (Option<Files>, u64)>,
    /// The state after a command, and whether it was applied.
    applied: HashMap<(usize, Step), Option<usize>>,
    /// The authority that the change leads to.
    new: super::super::state::records::Authority,
    old: String,
    now_ms: u64,
}

fn member(command: MemberCommand) -> Command {
    Command::Member(Box::new(command))
}

fn address() -> SocketAddr {
    "192.0.2.1:7440".parse().unwrap()
}

impl Explorer {
    fn new(story: Story) -> Self {
        let now_ms = clock::now_ms();
        let keys = [LEADER, SECOND, THIRD].map(|node| (node, new_key().unwrap()));
        let trust = begin("c", now_ms - 1_000).unwrap();
        let mut state = State::default();
        let mut run = |command: Command| {
            let proposal = Proposal { now_ms, key: None, command };
            state.apply(state.revision() + 1, &proposal).unwrap()
        };
        run(init(16));
        run(member(MemberCommand::SetTrust(Box::new(trust.clone()))));
        let mut explorer = Self {
            story,
            states: Vec::new(),
            known: HashMap::new(),
            texts: Vec::new(),
            keys: keys.into(),
            talks: HashMap::new(),
            given: HashMap::new(),
            choices: HashMap::new(),
            applied: HashMap::new(),
            new: make("c", now_ms).unwrap(),
            old: trust.authorities[0].sha256.clone(),
            now_ms,
        };
        let token = |sha256: &str| JoinTokenRecord {
            sha256: sha256.into(),
            created_at_ms: 1,
            expires_at_ms: u64::MAX,
        };
        run(member(MemberCommand::PutJoinToken(token("second"))));
        run(member(MemberCommand::PutJoinToken(token("third"))));
        run(explorer.join("second", SECOND));
        for node in [LEADER, SECOND] {
            run(member(MemberCommand::Announce { node, facts: Box::new(explorer.facts(node, 1)) }));
        }
        let first = explorer.intern(state);
        assert_eq!(first, 0);
        explorer
    }

    fn facts(&self, node: NodeId, trust_version: u64) -> NodeFacts {
        NodeFacts {
            name: format!("n{node}"),
            address: Some(address()),
            public_key: Some(self.keys[&node].1.clone()),
            labels: Default::default(),
            version: "1".into(),
            feature_level: feature_level(),
            trust_version,
        }
    }

    fn join(&self, token: &str, node: NodeId) -> Command {
        member(MemberCommand::Join { token: token.into(), facts: Box::new(self.facts(node, 0)) })
    }

    /// Number of a state: equal records have the same.
    fn intern(&mut self, state: State) -> usize {
        let mut records = Vec::new();
        for key in state.keys() {
            records.extend(key.to_string().bytes());
            records.extend(state.record(&key).unwrap().unwrap());
        }
        *self.known.entry(records).or_insert_with(|| {
            self.states.push(state);
            self.states.len() - 1
        })
    }

    fn text(&mut self, text: String) -> usize {
        self.texts.iter().position(|known| *known == text).unwrap_or_else(|| {
            self.texts.push(text);
            self.texts.len() - 1
        })
    }

    fn files(&mut self, certificate: String, authorities: String, version: u64) -> Files {
        Files { authorities: self.text(authorities), certificate: self.text(certificate), version }
    }

    fn keys_of(&self, node: NodeId, files: Files) -> Keys {
        let identity = Identity {
            cluster: "c".into(),
            node,
            address: address(),
            bind: address(),
            trust_version: if self.story.remembers { files.version } else { 0 },
        };
        Keys {
            identity,
            key_pem: self.keys[&node].0.clone(),
            certificate_pem: self.texts[files.certificate].clone(),
            authorities_pem: self.texts[files.authorities].clone(),
        }
    }

    /// What a node is given by this trust, as who admits it does.
    fn admit(&mut self, node: NodeId, trust: &TrustRecord) -> Files {
        if let Some(known) = self.given.get(&(node, trust.version)) {
            return *known;
        }
        let public = self.keys[&node].1.clone();
        let certificate = certify(trust, node, &public, self.now_ms, NODE_VALID).unwrap();
        let files = self.files(certificate, trust.authorities_pem(), trust.version);
        self.given.insert((node, trust.version), files);
        files
    }

    /// What the keeper of a node with these files does at this trust.
    fn choose(&mut self, node: NodeId, files: Files, trust: &TrustRecord) -> (Option<Files>, u64) {
        let key = (node, files, trust.version);
        if let Some(known) = self.choices.get(&key) {
            return *known;
        }
        let keys = self.keys_of(node, files);
        let next = renewed(&keys, trust, self.now_ms).unwrap();
        let next = next.map(|keys| self.files(keys.certificate_pem, keys.authorities_pem, trust.version));
        let chosen = (next, followed(&keys, trust).unwrap());
        self.choices.insert(key, chosen);
        chosen
    }

    /// Whether both can begin a connection to the other one: real handshakes.
    fn talk(&mut self, (a, of_a): (NodeId, Files), (b, of_b): (NodeId, Files)) -> bool {
        // The version is no part of a handshake.
        let plain = |files: Files| Files { version: 0, ..files };
        let key = (a, plain(of_a), b, plain(of_b));
        if let Some(known) = self.talks.get(&key) {
            return *known;
        }
        let tls = |node, files| Tls::new(self.keys_of(node, files)).unwrap();
        let (at_a, at_b) = (tls(a, of_a), tls(b, of_b));
        let good = handshake(&at_a, a, &at_b, b) && handshake(&at_b, b, &at_a, a);
        self.talks.insert(key, good);
        good
    }

    /// Adds a command to the log; `None` when it is refused or changes nothing.
    fn append(&mut self, world: &World, step: Step, command: impl FnOnce(&Self) -> Command) -> Option<World> {
        let newest = *world.log.last().unwrap();
        let after = match self.applied.get(&(newest, step)) {
            Some(known) => *known,
            None => {
                let mut state = self.states[newest].clone();
                let proposal = Proposal { now_ms: self.now_ms, key: None, command: command(self) };
                let applied = state.apply(state.revision() + 1, &proposal).is_ok();
                let number = self.intern(state);
                let after = applied.then_some(number);
                self.applied.insert((newest, step), after);
                after
            }
        };
        let mut next = world.clone();
        if after? != newest {
            next.log.push(after?);
        }
        Some(next)
    }

    fn begin(&mut self) -> World {
        let trust = self.states[0].trust().unwrap().clone();
        let node = |explorer: &mut Self, node| {
            let files = explorer.admit(node, &trust);
            (node, Node { applied: 0, received: 0, memory: files, disk: files, storing: None })
        };
        let nodes = vec![node(self, LEADER), node(self, SECOND)];
        let world = World { log: vec![0], nodes, admission: None, crashes: 0 };
        let mut changed = trust.as_ref().clone();
        changed.version += 1;
        changed.authorities.push(self.new.clone());
        let step = Step::SetTrust(changed.version);
        self.append(&world, step, |_| member(MemberCommand::SetTrust(Box::new(changed)))).unwrap()
    }

    /// What can happen next.
    fn next(&mut self, world: &World) -> Vec<World> {
        let mut all = Vec::new();
        for at in 0..world.nodes.len() {
            self.of_node(world, at, &mut all);
        }
        let newest = *world.log.last().unwrap();
        if self.story.joins {
            let joined = world.nodes.iter().any(|(node, _)| *node == THIRD);
            // Asked for again as long as the answer is lost.
            if !joined
                && let Some(mut next) = self.append(world, Step::Join, |model| model.join("third", THIRD))
            {
                let trust = self.states[*next.log.last().unwrap()].trust().unwrap().clone();
                next.admission = Some(self.admit(THIRD, &trust));
                all.push(next);
            }
            if let Some(files) = world.admission {
                let mut next = world.clone();
                next.admission = None;
                let node = Node { applied: 0, received: 0, memory: files, disk: files, storing: None };
                next.nodes.push((THIRD, node));
                all.push(next);
            }
        }
        // The leader's own look, at what it has applied.
        let applied = world.log[world.nodes[0].1.applied];
        let step = if self.story.waits {
            next_trust(&self.states[applied])
        } else {
            self.states[applied].trust().and_then(|trust| trust.next_step())
        };
        if let Some(step) = step
            && let Some(next) = self.append(world, Step::SetTrust(step.version), |_| {
                member(MemberCommand::SetTrust(Box::new(step)))
            })
        {
            assert_ne!(next.log.last(), Some(&newest));
            all.push(next);
        }
        all.retain(|next| next != world);
        all
    }

    fn of_node(&mut self, world: &World, at: usize, all: &mut Vec<World>) {
        let (id, node) = world.nodes[at].clone();
        let with = |change: &dyn Fn(&mut Node)| {
            let mut next = world.clone();
            change(&mut next.nodes[at].1);
            next
        };
        // It gets the next entry from the leader, or has it on its disk.
        if node.applied + 1 < world.log.len() {
            let has = id == LEADER || node.received > node.applied;
            let leader = (LEADER, world.nodes[0].1.memory);
            if has || self.talk((id, node.memory), leader) {
                all.push(with(&|n| {
                    n.applied += 1;
                    n.received = n.received.max(n.applied);
                }));
            }
        }
        if id == SECOND && world.crashes < self.story.crashes {
            let mut next = with(&|n| {
                n.applied = 0;
                n.memory = n.disk;
                n.storing = None;
            });
            next.crashes += 1;
            all.push(next);
        }
        let state = world.log[node.applied];
        let Some(trust) = self.states[state].trust().cloned() else { return };
        if let Some((files, stored)) = node.storing {
            // In the order of `Keys::store`.
            all.push(with(&|n| match stored {
                0 => {
                    n.disk.authorities = files.authorities;
                    n.storing = Some((files, 1));
                }
                1 => {
                    n.disk.certificate = files.certificate;
                    n.storing = Some((files, 2));
                }
                _ => {
                    n.disk.version = files.version;
                    n.memory = files;
                    n.storing = None;
                }
            }));
            return;
        }
        let (renewal, follows) = self.choose(id, node.memory, &trust);
        if let Some(files) = renewal {
            let mut next = world.clone();
            next.nodes[at].1.storing = Some((files, 0));
            all.push(next);
        }
        // A node renews before it tells. After a crash the renewal may fail, and it tells all the same.
        if renewal.is_some() && world.crashes == 0 {
            return;
        }
        let facts = self.facts(id, follows);
        let known = self.states[state].node(id).map(|node| node.facts());
        if known.is_some_and(|known| known != facts) {
            let told = |_: &Self| member(MemberCommand::Announce { node: id, facts: Box::new(facts) });
            all.extend(self.append(world, Step::Announce(id, follows), told));
        }
    }

    /// Two nodes that cannot talk to each other, if there are.
    fn apart(&mut self, world: &World) -> Option<(NodeId, NodeId)> {
        let members: Vec<(NodeId, Files)> = world.nodes.iter().map(|(id, node)| (*id, node.memory)).collect();
        for (at, a) in members.iter().enumerate() {
            for b in &members[at + 1..] {
                if !self.talk(*a, *b) {
                    return Some((a.0, b.0));
                }
            }
        }
        None
    }

    /// Nothing is left to do: the change is complete, and a certificate of the old authority opens nothing.
    fn complete(&mut self, world: &World) -> bool {
        let newest = &self.states[*world.log.last().unwrap()];
        let trust = newest.trust().unwrap().clone();
        let version = trust.version;
        let done = trust.authorities.len() == 1
            && trust.authorities[0].sha256 != self.old
            && newest.nodes().all(|node| node.trust_version == version);
        let first = self.states[0].trust().unwrap().clone();
        let old = self.admit(SECOND, &first);
        let members: Vec<(NodeId, Files)> = world.nodes.iter().map(|(id, node)| (*id, node.memory)).collect();
        let has_old =
            members.iter().any(|(id, files)| *id != SECOND && self.talk((*id, *files), (SECOND, old)));
        done && !has_old && (!self.story.joins || members.len() == 3)
    }
}

/// Whether a connection from one node to another one comes about, and each sees whom it meant.
fn handshake(client: &Tls, from: NodeId, server: &Tls, to: NodeId) -> bool {
    let name = ServerName::try_from(node_name("c", to)).unwrap();
    let mut client = ClientConnection::new(client.configs().0, name).unwrap();
    let mut server = ServerConnection::new(server.configs().1).unwrap();
    let mut bytes = Vec::new();
    while client.is_handshaking() || server.is_handshaking() {
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        if server.process_new_packets().is_err() {
            return false;
        }
        bytes.clear();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        if client.process_new_packets().is_err() {
            return false;
        }
        bytes.clear();
    }
    let certificates = server.peer_certificates().unwrap_or_default();
    certificates.first().is_some_and(|certificate| node_of(certificate, "c").is_ok_and(|node| node == from))
}

/// What the search found.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// All is well in so many states.
    Nothing(usize),
    /// Two nodes that cannot talk to each other.
    Apart(NodeId, NodeId),
    /// Nothing goes on, and the change is not complete.
    Stuck,
}

fn explore(story: Story) -> Found {
    let mut explorer = Explorer::new(story);
    let first = explorer.begin();
    let mut seen = HashSet::from([first.clone()]);
    let mut open = vec![first];
    let mut ends = 0;
    while let Some(world) = open.pop() {
        if let Some((a, b)) = explorer.apart(&world) {
            return Found::Apart(a, b);
        }
        let next = explorer.next(&world);
        if next.is_empty() {
            ends += 1;
            if !explorer.complete(&world) {
                return Found::Stuck;
            }
        }
        open.extend(next.into_iter().filter(|next| seen.insert(next.clone())));
        assert!(seen.len() < 3_000_000, "too many states to look at");
    }
    assert!(ends > 0, "it never ends");
    Found::Nothing(seen.len())
}

const STORY: Story = Story { crashes: 0, joins: false, waits: true, remembers: true };

fn all_is_well(story: Story, least: usize) {
    match explore(story) {
        Found::Nothing(states) => assert!(states > least, "{states}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn nodes_that_lag_can_talk_to_each_other_until_the_change_is_complete() {
    all_is_well(STORY, 100);
}

#[test]
fn a_node_that_crashes_between_two_files_and_applies_its_log_anew_is_not_locked_out() {
    all_is_well(Story { crashes: 1, ..STORY }, 1_000);
}

#[test]
fn a_node_that_joins_at_any_moment_of_the_change_is_not_locked_out() {
    all_is_well(Story { joins: true, ..STORY }, 1_000);
}

#[test]
fn without_waiting_for_all_nodes_the_model_finds_two_that_cannot_talk() {
    assert!(matches!(explore(Story { waits: false, ..STORY }), Found::Apart(..)));
}

#[test]
fn a_node_that_goes_back_to_an_old_trust_is_found_by_the_model() {
    let found = explore(Story { joins: true, remembers: false, ..STORY });
    assert!(matches!(found, Found::Apart(..) | Found::Stuck), "{found:?}");
}
