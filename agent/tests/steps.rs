//! The steps of a model host: from every interruption they lead to what is wanted, in order, with one VMM at most.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a failed test is what they are for"
)]

use blixard_agent::record::{End, Known, ProcessId, Record, fold};
use blixard_agent::steps::{Ending, Found, Step, Wish, steps};
use blixard_agent_api::{Epoch, Start};
use blixard_vmm_api::VmId;
use proptest::prelude::*;

/// A host with one VM, as it is.
#[derive(Debug, Clone, Default)]
struct Host {
    /// The ledger: what survives the agent.
    records: Vec<Record>,
    vmms: u32,
    /// Starts that VMMs were launched for.
    launched: Vec<Start>,
    volume: Option<u64>,
    half_volume: bool,
    nic: bool,
    cgroup: bool,
    sockets: bool,
    files: bool,
    boots: u32,
}

/// What the agent holds only while it lives.
#[derive(Debug, Clone, Default)]
struct Agent {
    tap: bool,
    ending: Ending,
    storage: bool,
}

fn vm() -> VmId {
    VmId::from_u128(1)
}

impl Host {
    fn known(&self) -> Option<Known> {
        fold(self.records.clone()).remove(&vm())
    }

    fn found(&self, agent: &Agent, content: bool) -> Found {
        let known = self.known();
        let boot = known.as_ref().and_then(|k| k.launch.as_ref()).map(|l| l.boot.clone());
        Found {
            vmm: self.vmms > 0,
            ending: agent.ending,
            rebooted: boot.is_some_and(|boot| boot != self.boots.to_string()),
            volume_bytes: self.volume,
            storage: agent.storage || self.volume.is_some(),
            nic: known.as_ref().is_some_and(|k| k.nic),
            tap: agent.tap,
            cgroup: self.cgroup,
            sockets: self.sockets,
            files: self.files,
            content,
            network: true,
        }
    }

    /// A new agent looks at the host: a VMM that was not recorded is.
    fn look(&mut self) -> Agent {
        if let (1, Some(launch)) = (self.vmms, self.known().and_then(|k| k.launch))
            && launch.process.is_none()
        {
            let process = ProcessId { pid: 1, started: 1 };
            self.records.push(Record::Launched { vm: vm(), start: launch.start, process });
        }
        Agent { storage: self.known().is_some(), ..Agent::default() }
    }

    /// Does one step up to `part` of its parts; true when it was done whole.
    fn take(&mut self, agent: &mut Agent, wish: Option<Wish>, step: &Step, part: u32) -> bool {
        let wish = wish.unwrap_or(Wish {
            epoch: Epoch(0),
            start: Start(0),
            run: false,
            nic: false,
            volume_bytes: 0,
        });
        let vm = vm();
        let mut left = part;
        let mut go = || {
            let goes = left > 0;
            left = left.saturating_sub(1);
            goes
        };
        macro_rules! part {
            ($deed:expr) => {
                if !go() {
                    return false;
                }
                $deed;
            };
        }
        match step {
            Step::Admit => {
                part!(self.records.push(Record::Admit { vm, epoch: wish.epoch, slot: 0 }));
            }
            Step::Begin(start) => {
                part!(self.records.push(Record::Begin { vm, start: *start, at_ms: 0 }));
            }
            Step::MakeVolume => {
                part!((agent.storage, self.half_volume) = (true, true));
                part!((self.half_volume, self.volume) = (false, self.volume.or(Some(wish.volume_bytes))));
                part!(self.records.push(Record::Volume { vm, size_bytes: wish.volume_bytes }));
            }
            Step::MakeFolders => {
                part!(self.sockets = true);
                part!(self.files = true);
            }
            Step::OpenNic => {
                part!(self.records.push(Record::Nic { vm, exists: true }));
                part!(self.nic = true);
                part!(agent.tap = true);
            }
            Step::MakeCgroup => {
                part!(self.cgroup = true);
            }
            Step::Launch => {
                assert!(
                    self.volume.is_some() && self.cgroup && self.sockets && self.files,
                    "launched too early"
                );
                assert!(!wish.nic || (self.nic && agent.tap), "launched without its nic");
                part!({
                    agent.tap = false;
                    self.records.push(Record::Launching {
                        vm,
                        start: wish.start,
                        boot: self.boots.to_string(),
                    });
                });
                part!({
                    self.vmms += 1;
                    self.launched.push(wish.start);
                    assert_eq!(self.vmms, 1, "two VMMs of one VM");
                });
                let process = ProcessId { pid: 1, started: 1 };
                part!(self.records.push(Record::Launched { vm, start: wish.start, process }));
            }
            Step::Fail(_) => {
                let end = Box::new(End { start: wish.start, fault: Some("x".into()), ..End::default() });
                part!(self.records.push(Record::Ended { vm, end }));
            }
            Step::AskEnd => {
                part!(agent.ending = Ending::Asked);
            }
            Step::Kill => {
                part!(agent.ending = Ending::Killed);
            }
            Step::RecordEnd => {
                assert_eq!(self.vmms, 0);
                let start = self.known().unwrap().launch.unwrap().start;
                let end = Box::new(End { start, ..End::default() });
                part!(self.records.push(Record::Ended { vm, end }));
                agent.ending = Ending::NotAsked;
            }
            Step::RemoveNic => {
                assert_eq!(self.vmms, 0, "a nic in use is not removed");
                part!((agent.tap, self.nic) = (false, false));
                part!(if self.known().is_some() {
                    self.records.push(Record::Nic { vm, exists: false });
                });
            }
            Step::RemoveCgroup => {
                part!(self.cgroup = false);
            }
            Step::RemoveSockets => {
                part!(self.sockets = false);
            }
            Step::RemoveVolume => {
                assert_eq!(self.vmms, 0, "a volume in use is not removed");
                part!(self.records.push(Record::Discard { vm }));
                part!(self.half_volume = false);
                part!((self.volume, agent.storage) = (None, false));
            }
            Step::RemoveFiles => {
                part!(self.files = false);
            }
            Step::Forget => {
                assert!(
                    !self.nic && !self.cgroup && self.volume.is_none() && !self.half_volume,
                    "forgotten too early"
                );
                part!(self.records.push(Record::Gone { vm }));
            }
        }
        true
    }

    /// What happens by itself: time passes, a killed or asked VMM ends.
    fn settle(&mut self, agent: &mut Agent) -> bool {
        if self.vmms > 0 && agent.ending == Ending::Killed {
            self.vmms = 0;
            return true;
        }
        if agent.ending == Ending::Asked {
            agent.ending = Ending::Overdue;
            return true;
        }
        false
    }

    /// Works until nothing is left to do.
    fn finish(&mut self, agent: &mut Agent, wish: Option<Wish>, content: bool) {
        for _ in 0..60 {
            let list = steps(wish, self.known().as_ref(), &self.found(agent, content));
            match list.first() {
                Some(step) => assert!(self.take(agent, wish, &step.clone(), u32::MAX)),
                None if self.settle(agent) => {}
                None => return,
            }
        }
        panic!("no end: {:?}", steps(wish, self.known().as_ref(), &self.found(agent, content)));
    }
}

#[derive(Debug, Clone)]
enum Event {
    /// A plan.
    Wish(Option<Wish>),
    /// This many steps are done, the last one only to this part; then the agent dies.
    Crash(u32, u32),
    /// The agent works until nothing is left to do.
    Finish,
    /// The VMM ends by itself.
    VmmEnds,
    /// The host is booted again.
    Reboot,
    /// Content is lost or comes.
    Content(bool),
}

fn wish() -> impl Strategy<Value = Option<Wish>> {
    let some = (1u64..4, 0u64..5, any::<bool>(), any::<bool>()).prop_map(|(epoch, start, run, nic)| {
        Some(Wish { epoch: Epoch(epoch), start: Start(start), run, nic, volume_bytes: 1 << 24 })
    });
    prop_oneof![4 => some, 1 => Just(None)]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        3 => wish().prop_map(Event::Wish),
        5 => (0u32..8, 0u32..4).prop_map(|(steps, part)| Event::Crash(steps, part)),
        1 => Just(Event::Finish),
        1 => Just(Event::VmmEnds),
        1 => Just(Event::Reboot),
        1 => any::<bool>().prop_map(Event::Content),
    ];
    proptest::collection::vec(event, 0..24)
}

fn play(events: Vec<Event>) -> (Host, Option<Wish>) {
    let mut host = Host::default();
    let (mut agent, mut wish, mut content) = (Agent::default(), None, true);
    for event in events {
        match event {
            Event::Wish(new) => wish = new,
            Event::Content(new) => content = new,
            Event::Finish => host.finish(&mut agent, wish, content),
            Event::VmmEnds => host.vmms = 0,
            Event::Reboot => {
                host.boots += 1;
                (host.vmms, host.nic, host.cgroup, host.sockets) = (0, false, false, false);
                agent = host.look();
            }
            Event::Crash(count, part) => {
                for number in 0..=count {
                    let list = steps(wish, host.known().as_ref(), &host.found(&agent, content));
                    let Some(step) = list.first() else { break };
                    host.take(&mut agent, wish, &step.clone(), if number == count { part } else { u32::MAX });
                }
                agent = host.look();
            }
        }
    }
    (host, wish)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happened_before_the_wanted_state_is_reached(history in events(), last in wish()) {
        let (mut host, _) = play(history);
        let epoch = host.known().map_or(Epoch(0), |k| k.epoch);
        let begun = host.known().map_or(Start(0), |k| k.begun_start());
        let mut agent = host.look();
        host.finish(&mut agent, last, true);
        match last {
            None => {
                prop_assert!(host.known().is_none() && host.vmms == 0 && host.volume.is_none() && !host.half_volume);
                prop_assert!(!host.nic && !host.cgroup && !host.sockets && !host.files);
            }
            // An older placement changes nothing.
            Some(last) if last.epoch < epoch => prop_assert_eq!(host.known().unwrap().epoch, epoch),
            Some(last) if !last.run => prop_assert!(host.vmms == 0 && !host.nic && !host.cgroup && !host.sockets),
            Some(last) if last.start > begun => prop_assert_eq!(host.vmms, 1),
            // This start runs or has ended; an older one than the newest is not begun any more.
            Some(last) => {
                let ended = host.known().unwrap_or_default().ended_start() == Some(begun);
                prop_assert!(host.vmms == 1 || ended || last.start < begun || last.start == Start(0));
            }
        }
    }

    #[test]
    fn no_start_is_launched_twice_and_none_after_a_later_one(history in events()) {
        let mut placements: Vec<Vec<Start>> = vec![vec![]];
        // A removed VM that comes back is another one: its starts count anew.
        for piece in history.split(|event| matches!(event, Event::Wish(None))) {
            let (host, _) = play(piece.to_vec());
            placements.push(host.launched);
        }
        for launched in placements {
            prop_assert!(launched.windows(2).all(|pair| pair[0] < pair[1]), "{launched:?}");
        }
    }

    #[test]
    fn a_volume_is_made_once(history in events()) {
        let history: Vec<Event> = history.into_iter().filter(|e| !matches!(e, Event::Wish(None))).collect();
        let (mut host, wish) = play(history);
        if host.known().is_some_and(|k| k.volume_bytes.is_some()) {
            host.volume = None;
            let mut agent = host.look();
            host.finish(&mut agent, wish, true);
            prop_assert!(host.volume.is_none());
        }
    }
}
