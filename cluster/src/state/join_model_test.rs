//! Every order of events around two join tokens, with the real `State::apply`: requests and answers that are lost, late or
//! repeated, a machine that crashes between any two of its steps, a thief with the same token, tokens that are revoked or
//! expire, a node that is removed and whose machine joins again. Whatever happens, a token makes one node, a number is given
//! once, and a machine that goes on asking comes in unless somebody else used its token or an operator was against it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::testing::init;
use super::{Answer, Command, JoinTokenRecord, MemberCommand, NodeFacts, NodeId, Proposal, State};

const FIRST: &str = "first";
const SECOND: &str = "second";
const THIEF: &str = "thief";
const NOW_MS: u64 = 1_795_000_000_000;
const EXPIRES_MS: u64 = NOW_MS + 1_000;

/// What a machine does.
#[derive(Clone, Copy)]
struct Manner {
    /// It stores its key before it asks for the first time, so that it asks with the same one after a crash.
    keeps_key: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct World {
    /// Number of the state.
    state: usize,
    late: bool,
    /// Requests that may arrive, at any time and any number of times: token, key.
    sent: BTreeSet<(&'static str, String)>,
    /// Answers that may arrive: key, number.
    answers: BTreeSet<(String, NodeId)>,
    /// Numbers that were given, by token.
    given: BTreeMap<&'static str, BTreeSet<NodeId>>,
    /// Token that the machine was told.
    token: &'static str,
    /// Key that it asks with.
    key: Option<String>,
    /// How many keys it has made.
    keys: u8,
    /// What it is.
    identity: Option<(NodeId, String)>,
    /// An operator revoked a token, removed its node, or the thief came first.
    spoiled: bool,
}

struct Explorer {
    manner: Manner,
    states: Vec<State>,
    known: HashMap<Vec<u8>, usize>,
}

fn member(command: MemberCommand) -> Command {
    Command::Member(Box::new(command))
}

fn join(token: &str, key: &str) -> Command {
    let facts = NodeFacts {
        name: key.into(),
        address: None,
        public_key: Some(key.into()),
        labels: BTreeMap::new(),
        version: "1".into(),
        feature_level: crate::node::feature_level(),
        trust_version: 0,
    };
    member(MemberCommand::Join { token: token.into(), facts: Box::new(facts) })
}

fn token(sha256: &str) -> Command {
    let token = JoinTokenRecord { sha256: sha256.into(), created_at_ms: 1, expires_at_ms: EXPIRES_MS };
    member(MemberCommand::PutJoinToken(token))
}

impl Explorer {
    fn new(manner: Manner) -> (Self, World) {
        let mut explorer = Self { manner, states: Vec::new(), known: HashMap::new() };
        let mut state = State::default();
        for command in [init(16), token(FIRST)] {
            let proposal = Proposal { now_ms: NOW_MS, key: None, command };
            state.apply(state.revision() + 1, &proposal).unwrap();
        }
        let world = World {
            state: explorer.intern(state),
            late: false,
            sent: BTreeSet::new(),
            answers: BTreeSet::new(),
            given: BTreeMap::new(),
            token: FIRST,
            key: None,
            keys: 0,
            identity: None,
            spoiled: false,
        };
        (explorer, world)
    }

    /// Number of a state. Generations of plans grow with the log and mean nothing here.
    fn intern(&mut self, state: State) -> usize {
        let mut records = Vec::new();
        for key in state.keys() {
            let record = state.record(&key).unwrap().unwrap();
            let mut record: serde_json::Value = serde_json::from_slice(&record).unwrap();
            record["plan_generation"] = 0.into();
            records.extend(format!("{key}={record}").bytes());
        }
        *self.known.entry(records).or_insert_with(|| {
            self.states.push(state);
            self.states.len() - 1
        })
    }

    fn apply(&mut self, world: &mut World, command: Command) -> Option<Answer> {
        let mut state = self.states[world.state].clone();
        let now_ms = if world.late { EXPIRES_MS } else { NOW_MS };
        let outcome = state.apply(state.revision() + 1, &Proposal { now_ms, key: None, command });
        world.state = self.intern(state);
        outcome.ok()
    }

    fn next(&mut self, world: &World) -> Vec<World> {
        let mut all = Vec::new();
        let mut step = |change: &mut dyn FnMut(&mut World)| {
            let mut next = world.clone();
            change(&mut next);
            if next != *world {
                all.push(next);
            }
        };
        // The machine: makes a key, asks, crashes. It may do any of it at any time.
        if world.identity.is_none() {
            match &world.key {
                None if world.keys < 3 => step(&mut |w| {
                    w.keys += 1;
                    w.key = Some(format!("key-{}", w.keys));
                }),
                None => {}
                Some(key) => {
                    step(&mut |w| {
                        w.sent.insert((w.token, key.clone()));
                    });
                    for (_, node) in world.answers.iter().filter(|(to, _)| to == key) {
                        step(&mut |w| w.identity = Some((*node, key.clone())));
                    }
                    // The last one stays: that it has none left is no matter of the token.
                    if !self.manner.keeps_key && world.keys < 3 {
                        step(&mut |w| w.key = None);
                    }
                }
            }
        }
        step(&mut |w| {
            w.sent.insert((FIRST, THIEF.to_owned()));
        });
        step(&mut |w| w.late = true);
        // Requests arrive; each may do so again.
        for (token, key) in &world.sent {
            step(&mut |w| {
                if let Some(Answer::Node(node)) = self.apply(w, join(token, key)) {
                    w.answers.insert((key.clone(), node.id));
                    w.given.entry(token).or_default().insert(node.id);
                    w.spoiled |= key == THIEF;
                }
            });
        }
        // The operator revokes the token, removes the node, and lets the machine join as a new one.
        step(&mut |w| {
            let revoke = member(MemberCommand::DeleteJoinToken { sha256: FIRST.into() });
            w.spoiled |= self.apply(w, revoke).is_some();
        });
        let nodes: Vec<NodeId> = self.states[world.state].nodes().map(|node| node.id).collect();
        for node in nodes.into_iter().filter(|node| *node != 1) {
            step(&mut |w| {
                w.spoiled |= self.apply(w, member(MemberCommand::Remove { node })).is_some();
            });
        }
        let removed =
            world.identity.as_ref().is_some_and(|(node, _)| self.states[world.state].node(*node).is_none());
        if removed && world.token == FIRST {
            step(&mut |w| {
                if self.apply(w, token(SECOND)).is_some() {
                    (w.token, w.key, w.identity, w.late) = (SECOND, None, None, false);
                }
            });
        }
        all
    }

    /// What is wrong with a world, if something is.
    fn wrong(&self, world: &World) -> Option<&'static str> {
        let numbers: Vec<NodeId> = world.given.values().flatten().copied().collect();
        let different: BTreeSet<NodeId> = numbers.iter().copied().collect();
        let of_key =
            |node: NodeId| self.states[world.state].node(node).map(|record| record.public_key.clone());
        let holders: BTreeSet<NodeId> = world.answers.iter().map(|(_, node)| *node).collect();
        if world.given.values().any(|numbers| numbers.len() > 1) {
            Some("a token made two nodes")
        } else if different.len() != numbers.len() || different.contains(&1) {
            Some("a number was given twice")
        } else if holders.len() != world.answers.len() {
            Some("two keys were told the same number")
        } else if world
            .identity
            .as_ref()
            .is_some_and(|(node, key)| of_key(*node).is_some_and(|k| k.as_ref() != Some(key)))
        {
            Some("a node is not who the state says")
        } else {
            None
        }
    }
}

/// Looks at all worlds; answers them, or what is wrong.
fn explore(manner: Manner) -> Result<Vec<World>, &'static str> {
    let (mut explorer, first) = Explorer::new(manner);
    let mut numbers = BTreeMap::from([(first.clone(), 0)]);
    let mut worlds = vec![first];
    let mut before: Vec<Vec<usize>> = vec![vec![]];
    let mut at = 0;
    while at < worlds.len() {
        let world = worlds[at].clone();
        if let Some(wrong) = explorer.wrong(&world) {
            return Err(wrong);
        }
        for next in explorer.next(&world) {
            let number = *numbers.entry(next.clone()).or_insert_with(|| {
                worlds.push(next);
                before.push(vec![]);
                worlds.len() - 1
            });
            before[number].push(at);
        }
        at += 1;
        assert!(worlds.len() < 1_000_000, "too many worlds to look at");
    }
    // From which worlds the machine can come in.
    let mut open: Vec<usize> = (0..worlds.len()).filter(|n| worlds[*n].identity.is_some()).collect();
    let mut reaches: BTreeSet<usize> = open.iter().copied().collect();
    while let Some(number) = open.pop() {
        open.extend(before[number].iter().copied().filter(|n| reaches.insert(*n)));
    }
    let in_time = |world: &World| {
        let asked = world.given.contains_key(FIRST);
        !world.spoiled && (!world.late || asked)
    };
    match worlds.iter().enumerate().any(|(n, world)| in_time(world) && !reaches.contains(&n)) {
        true => Err("a machine with a good token cannot come in"),
        false => Ok(worlds),
    }
}

#[test]
fn a_token_makes_one_node_and_whoever_goes_on_asking_with_it_comes_in() {
    let worlds = explore(Manner { keeps_key: true }).unwrap();
    let ends = |end: fn(&World) -> bool| worlds.iter().any(end);
    assert!(ends(|w| w.identity.is_some() && w.token == SECOND && w.given.len() == 2), "it joins again");
    assert!(
        ends(|w| w.given.contains_key(FIRST) && w.identity.is_none() && w.spoiled),
        "the thief is faster"
    );
    assert!(ends(|w| w.late && w.given.is_empty() && !w.sent.is_empty()), "it is too late");
    assert!(worlds.len() > 70, "{}", worlds.len());
}

#[test]
fn a_machine_that_forgets_its_key_in_a_crash_is_found_to_be_locked_out() {
    let found = explore(Manner { keeps_key: false }).map(|worlds| worlds.len());
    assert_eq!(found, Err("a machine with a good token cannot come in"));
}
