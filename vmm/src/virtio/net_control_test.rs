//! Cards with several pairs of queues, their control queue, and limits.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use blixard_vmm_api::config::MacAddr;
use blixard_vmm_api::rate::{Bucket, RateLimit};
use proptest::prelude::*;

use super::device::Device;
use super::guest_driver::{Buffer, Machine};
use super::net::{Net, NetError, Parts};
use super::net_tap::Tap;
use super::net_test::real_taps;
use super::vhost_net::Vhost;
use crate::snapshot::codec::{Reader, Writer};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
const GUEST_CSUM: u64 = 1 << 1;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const GUEST_TSO4: u64 = 1 << 7;
const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const MQ: u64 = 1 << 22;
const ALL: u64 = CTRL_VQ | MQ | GUEST_ANNOUNCE | MRG_RXBUF | GUEST_CSUM;

const PAIRS: usize = 3;
const SLOT: u64 = 0x2_0000;

struct Card {
    machine: Machine<Net>,
    control: u16,
    wires: Vec<UnixDatagram>,
}

fn parts(pairs: usize) -> (Parts, Vec<UnixDatagram>) {
    let (mut taps, mut wires) = (vec![], vec![]);
    for _ in 0..pairs {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        taps.push(Tap::from_datagrams(ours.into()).unwrap());
        wires.push(theirs);
    }
    let first = taps.remove(0);
    let mut parts = Parts::new(first, MAC, 1500);
    parts.taps.extend(taps);
    (parts, wires)
}

impl Card {
    fn new(features: u64) -> Self {
        let (parts, wires) = parts(PAIRS);
        Self::of(parts, wires, features)
    }

    fn of(parts: Parts, wires: Vec<UnixDatagram>, features: u64) -> Self {
        let pairs = if features & MQ != 0 { parts.taps.len() as u16 } else { 1 };
        Self { machine: Machine::start(Net::new(parts).unwrap(), features, true), control: 2 * pairs, wires }
    }

    /// The answer to a command, if there is one.
    fn command(&mut self, bytes: &[u8]) -> Option<u8> {
        let at = self.machine.buffers;
        self.machine.put(at, bytes);
        self.machine.put(at + 0x1000, &[0xAA]);
        let buffers = [Buffer::Readable(at, bytes.len() as u32), Buffer::Writable(at + 0x1000, 1)];
        let control = usize::from(self.control);
        self.machine.queues[control].post(&buffers).unwrap();
        self.machine.kick(self.control);
        let (_, filled) = self.machine.queues[control].take_used()?;
        (filled == 1).then(|| self.machine.get(at + 0x1000, 1)[0])
    }

    fn use_pairs(&mut self, count: u16) -> Option<u8> {
        self.command(&[[4, 0], count.to_le_bytes()].concat())
    }

    fn send(&mut self, pair: u16, byte: u8) {
        self.post(pair, byte);
        self.settle();
    }

    fn post(&mut self, pair: u16, byte: u8) {
        let at = self.machine.buffers + SLOT * u64::from(pair + 1) + u64::from(byte) * 0x100;
        self.machine.put(at, &[0; 12]);
        self.machine.put(at + 12, &[byte; 60]);
        self.machine.queues[usize::from(2 * pair + 1)].post(&[Buffer::Readable(at, 72)]).unwrap();
        self.machine.kick(2 * pair + 1);
    }

    fn offer(&mut self, pair: u16, count: u64) {
        for n in 0..count {
            let at = self.machine.buffers + SLOT * u64::from(pair + 10) + n * 0x800;
            self.machine.queues[usize::from(2 * pair)].post(&[Buffer::Writable(at, 1536)]).unwrap();
        }
        self.machine.kick(2 * pair);
    }

    fn settle(&mut self) {
        while self.machine.events.turn(&mut self.machine.device, Duration::from_millis(2)) > 0 {}
    }

    fn received(&mut self, pair: u16) -> usize {
        std::iter::from_fn(|| self.machine.queues[usize::from(2 * pair)].take_used()).count()
    }

    /// First byte of each frame that arrived at this queue of the tap.
    fn sent(&self, pair: usize) -> Vec<u8> {
        let next = || {
            let mut bytes = [0; 2000];
            match self.wires[pair].recv(&mut bytes) {
                Ok(length) => Some((length == 72).then_some(bytes[12]).unwrap()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => None,
                Err(error) => panic!("{error}"),
            }
        };
        std::iter::from_fn(next).collect()
    }

    fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.machine.device.config().read(6, &mut status);
        u16::from_le_bytes(status)
    }
}

#[test]
fn one_pair_is_served_until_the_driver_asks_for_more_and_after_it_asked_for_less() {
    let mut card = Card::new(ALL);
    for pair in 0..3 {
        card.send(pair, 1);
        card.offer(pair, 60);
    }
    let frame = [[0; 12].as_slice(), &[9; 60]].concat();
    for wire in &card.wires {
        wire.send(&frame).unwrap();
    }
    card.settle();
    assert_eq!((card.sent(0), card.sent(1), card.sent(2)), (vec![1], vec![], vec![]));
    assert_eq!((0..3).map(|pair| card.received(pair)).collect::<Vec<_>>(), [1, 0, 0]);
    assert_eq!(card.use_pairs(2), Some(0));
    card.settle();
    assert_eq!((card.sent(0), card.sent(1), card.sent(2)), (vec![], vec![1], vec![]));
    assert_eq!((0..3).map(|pair| card.received(pair)).collect::<Vec<_>>(), [0, 1, 0]);
    assert_eq!(card.use_pairs(3), Some(0));
    assert_eq!(card.sent(2), [1]);
    assert_eq!(card.use_pairs(1), Some(0));
    for pair in 0..3 {
        card.send(pair, 2);
    }
    assert_eq!((card.sent(0), card.sent(1), card.sent(2)), (vec![2], vec![], vec![]));
    card.machine.reset();
    assert_eq!(card.machine.events.watched(), 0);
}

#[test]
fn a_fresh_driver_begins_with_one_pair() {
    let mut card = Card::new(ALL);
    assert_eq!(card.use_pairs(3), Some(0));
    card.machine.reset();
    card.machine.activate();
    card.send(2, 1);
    assert!(card.sent(2).is_empty());
    card.send(0, 1);
    assert_eq!(card.sent(0), [1]);
}

#[test]
fn a_card_of_a_snapshot_goes_on_with_the_pairs_and_offloads_in_use_and_announces_itself() {
    let mut card = Card::new(ALL | CTRL_GUEST_OFFLOADS | GUEST_TSO4);
    assert_eq!(card.use_pairs(2), Some(0));
    assert_eq!(card.command(&[[5, 0].as_slice(), &GUEST_CSUM.to_le_bytes()].concat()), Some(0));
    // A chain that was only taken is not given back by the pause, and taken again after it.
    card.offer(1, 3);
    card.machine.device.on_pause(true, &mut card.machine.events);
    let mut state = Writer::new();
    card.machine.device.save(&mut state);
    let state = state.into_bytes();
    card.machine.reset();

    let (parts, wires) = parts(PAIRS);
    card.machine.device = Net::new(parts).unwrap();
    card.wires = wires;
    card.machine.device.restore(&mut Reader::new(&state)).unwrap();
    card.machine.device.on_pause(true, &mut card.machine.events);
    card.machine.activate();
    card.machine.device.on_pause(false, &mut card.machine.events);
    assert_eq!(card.status(), 3);
    card.offer(1, 3);
    for pair in 0..3 {
        card.send(pair, 1);
    }
    assert_eq!((card.sent(0), card.sent(1), card.sent(2)), (vec![1], vec![1], vec![]));
    card.wires[1].send(&[[0; 12].as_slice(), &[9; 60]].concat()).unwrap();
    card.settle();
    assert_eq!(card.received(1), 1);
    let mut again = Writer::new();
    card.machine.device.save(&mut again);
    assert_eq!(again.into_bytes(), state);
}

#[test]
fn the_state_of_no_possible_card_is_refused() {
    let state = |pairs: u16, offloads: u64| {
        let mut state = Writer::new();
        state.u16(pairs);
        state.u64(offloads);
        state.into_bytes()
    };
    let restore = |bytes: &[u8]| Net::new(parts(PAIRS).0).unwrap().restore(&mut Reader::new(bytes));
    restore(&state(3, GUEST_CSUM)).unwrap();
    for bad in [state(0, 0), state(4, 0), state(1, MRG_RXBUF), state(1, 0)[..9].to_vec()] {
        restore(&bad).unwrap_err();
    }
}

#[test]
fn what_is_impossible_or_unknown_is_answered_with_an_error() {
    let mut card = Card::new(ALL);
    for bytes in [
        [4, 0, 0, 0].as_slice(), // no pair
        &[4, 0, 4, 0],           // more than there are
        &[4, 0, 1],              // too short
        &[4, 1, 1, 0],
        &[0, 0, 1],                      // promiscuous: not offered
        &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], // offloads: not agreed on
        &[0xFF, 0xFF],
        &[3],
    ] {
        assert_eq!(card.command(bytes), Some(1), "{bytes:?}");
    }
    assert_eq!(card.machine.interrupts.reset_count(), 0);
    assert_eq!(card.use_pairs(2), Some(0), "it goes on");
}

#[test]
fn offloads_are_switched_within_what_was_agreed_on() {
    let mut card = Card::new(ALL | CTRL_GUEST_OFFLOADS);
    let set = |bits: u64| [[5, 0].as_slice(), &bits.to_le_bytes()].concat();
    assert_eq!(card.command(&set(GUEST_CSUM)), Some(0));
    assert_eq!(card.command(&set(0)), Some(0));
    assert_eq!(card.command(&set(GUEST_CSUM | GUEST_TSO4)), Some(1));
    assert_eq!(card.command(&set(MRG_RXBUF)), Some(1));
}

#[test]
fn without_mq_the_control_queue_is_the_third_and_there_is_one_pair() {
    let mut card = Card::new(CTRL_VQ | GUEST_ANNOUNCE);
    assert_eq!(card.control, 2);
    assert_eq!(card.use_pairs(2), Some(1));
    assert_eq!(card.command(&[3, 0]), Some(0));
    card.send(0, 1);
    assert_eq!(card.sent(0), [1]);
    // Without a control queue its number means nothing.
    let mut card = Card::new(0);
    assert_eq!(card.command(&[3, 0]), None);
}

#[test]
fn the_driver_is_asked_to_announce_itself_until_it_says_that_it_has() {
    let mut card = Card::new(ALL);
    card.machine.device.announce();
    assert_eq!((card.status(), card.machine.interrupts.config_count()), (3, 1));
    assert_eq!(card.command(&[3, 0]), Some(0));
    assert_eq!(card.status(), 1);
    // A driver that cannot is not asked.
    let mut card = Card::new(CTRL_VQ);
    card.machine.device.announce();
    assert_eq!((card.status(), card.machine.interrupts.config_count()), (1, 0));
    assert_eq!(card.command(&[3, 0]), Some(1));
}

#[test]
fn a_command_without_a_place_for_its_answer_stops_the_card() {
    let mut card = Card::new(ALL);
    let at = card.machine.buffers;
    card.machine.queues[usize::from(card.control)].post(&[Buffer::Readable(at, 4)]).unwrap();
    card.machine.kick(card.control);
    assert_eq!(card.machine.interrupts.reset_count(), 1);
    card.send(0, 1);
    assert!(card.sent(0).is_empty());
    card.machine.reset();
    card.machine.activate();
    assert_eq!(card.use_pairs(2), Some(0));
}

#[test]
fn more_commands_than_fit_in_a_turn_are_all_answered() {
    let mut card = Card::new(ALL);
    let (at, control) = (card.machine.buffers, usize::from(card.control));
    card.machine.put(at, &[3, 0]);
    for _ in 0..32 {
        let buffers = [Buffer::Readable(at, 2), Buffer::Writable(at + 16, 1)];
        card.machine.queues[control].post(&buffers).unwrap();
    }
    card.machine.kick(card.control);
    card.settle();
    assert_eq!(std::iter::from_fn(|| card.machine.queues[control].take_used()).count(), 32);
}

#[test]
fn limits_hold_frames_back_in_both_directions_and_lose_none() {
    const FRAMES: usize = 40;
    let limit = |bytes, operations| {
        let bucket = |size| Some(Bucket { size, burst: 0, refill_ms: 20 });
        RateLimit { bytes: bucket(bytes), operations: bucket(operations) }
    };
    // 10 frames per 20 ms by number, or by bytes.
    for limit in [limit(1 << 30, 10), limit(600, 1 << 30)] {
        for receive in [false, true] {
            let (mut parts, wires) = parts(1);
            *(if receive { &mut parts.receive_limit } else { &mut parts.send_limit }) = limit;
            let mut card = Card::of(parts, wires, MRG_RXBUF);
            let begin = Instant::now();
            let mut done = 0;
            if receive {
                card.offer(0, 100);
            }
            for byte in 0..FRAMES {
                if receive {
                    let frame = [[0; 12].as_slice(), &[byte as u8; 60]].concat();
                    while card.wires[0].send(&frame).is_err() {
                        card.machine.events.turn(&mut card.machine.device, Duration::from_millis(10));
                    }
                } else {
                    card.post(0, byte as u8);
                }
            }
            while done < FRAMES {
                done += if receive { card.received(0) } else { card.sent(0).len() };
                let flowed = begin.elapsed().as_micros() as usize * 10 / 20_000;
                assert!(done <= 10 + flowed + 1, "{done} frames, {flowed} allowed after the first 10");
                assert!(begin.elapsed() < Duration::from_secs(10));
                card.machine.events.turn(&mut card.machine.device, Duration::from_millis(10));
            }
            let waits = if receive { "receive_waits" } else { "send_waits" };
            let counters = card.machine.device.counters();
            assert!(counters.iter().any(|(name, count)| *name == waits && *count > 0));
            card.machine.reset();
            assert_eq!(card.machine.events.watched(), 0);
        }
    }
}

#[test]
fn what_cannot_be_served_by_the_kernel_is_refused() {
    let null = || std::fs::File::open("/dev/null").unwrap().into();
    assert!(Vhost::new(null()).is_err());
    let (one, _wires) = parts(9);
    assert!(matches!(Net::new(one), Err(NetError::Pairs(9))));
}

#[test]
fn the_queues_of_a_real_tap_are_attached_as_the_driver_uses_them() {
    let Some(taps) = real_taps(2) else { return };
    let mut taps: Vec<Tap> = taps.into_iter().map(|tap| Tap::new(tap).unwrap()).collect();
    let mut parts = Parts::new(taps.remove(0), MAC, 1500);
    parts.taps.append(&mut taps);
    let mut card = Card::of(parts, vec![], ALL | CTRL_GUEST_OFFLOADS | GUEST_TSO4);
    for count in [2, 1, 2] {
        assert_eq!(card.use_pairs(count), Some(0));
    }
    let bits = (GUEST_CSUM | GUEST_TSO4).to_le_bytes();
    assert_eq!(card.command(&[[5, 0].as_slice(), &bits].concat()), Some(0));
    // A frame at each queue reaches the kernel, which a queue that is not attached refuses.
    for pair in 0..2 {
        card.send(pair, 1);
    }
    let counters = card.machine.device.counters();
    let count = |name: &str| counters.iter().find(|(n, _)| *n == name).unwrap().1;
    assert_eq!((count("sent_frames"), count("sent_dropped")), (2, 0));
    card.machine.reset();
    card.machine.activate();
    card.settle();
    assert_eq!(card.status(), 1, "the link is up");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is written into the control queue: each command is answered once or the card waits for a reset; and frames
    /// pass at pair 0 as long as it does not.
    #[test]
    fn no_command_breaks_the_card(
        commands in proptest::collection::vec((proptest::collection::vec(0u8..6, 0..12), 0u32..3, 0u16..8), 1..40),
    ) {
        let mut card = Card::new(ALL | CTRL_GUEST_OFFLOADS);
        let control = usize::from(card.control);
        for (bytes, room, kick) in commands {
            let at = card.machine.buffers;
            card.machine.put(at, &bytes);
            let mut buffers = vec![];
            if !bytes.is_empty() {
                buffers.push(Buffer::Readable(at, bytes.len() as u32));
            }
            if room > 0 {
                buffers.push(Buffer::Writable(at + 64, room));
            }
            if card.machine.queues[control].post(&buffers).is_none() {
                continue;
            }
            card.machine.kick(card.control);
            card.machine.device.on_kick(kick, &mut card.machine.events);
            if card.machine.interrupts.reset_count() > 0 {
                prop_assert_eq!(room, 0);
                return Ok(());
            }
            prop_assert!(room > 0 && card.machine.queues[control].take_used().is_some());
            card.send(0, 7);
            card.machine.queues[1].take_used();
            prop_assert_eq!(card.sent(0), [7]);
        }
    }
}
