//! Frames through the card: over a datagram socket in the place of the tap, and over a real tap where one can be made.

use std::collections::{BTreeMap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use blixard_vmm_api::config::MacAddr;
use proptest::prelude::*;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::device::Device;
use super::guest_driver::{Buffer, Machine};
use super::net::{Net, NetError, Parts};
use super::net_tap::{FRAME_MAX, Tap, TapError};

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const MRG_RXBUF: u64 = 1 << 15;
const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
const SLOT: u64 = 0x1_1000;

struct Card {
    machine: Machine<Net>,
    rx: BTreeMap<u16, (u64, u32)>,
    rx_free: Vec<u64>,
    tx: BTreeMap<u16, u64>,
    tx_free: Vec<u64>,
    /// Frames that arrived, without header.
    got: VecDeque<Vec<u8>>,
    /// Chains of the frame that is arriving: what is missing of it, its bytes.
    partial: Option<(u16, Vec<u8>)>,
    mergeable: bool,
}

impl Card {
    fn new(device: Net, features: u64, event_idx: bool) -> Self {
        let machine = Machine::start(device, features, event_idx);
        let base = machine.buffers;
        Self {
            machine,
            rx: BTreeMap::new(),
            rx_free: (0..100).map(|i| base + i * SLOT).collect(),
            tx: BTreeMap::new(),
            tx_free: (100..130).map(|i| base + i * SLOT).collect(),
            got: VecDeque::new(),
            partial: None,
            mergeable: features & MRG_RXBUF != 0,
        }
    }

    fn on_socket(features: u64, event_idx: bool) -> (Self, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let tap = Tap::from_datagrams(ours.into()).unwrap();
        (Self::new(Net::new(Parts::new(tap, MAC, 1500)).unwrap(), features, event_idx), theirs)
    }

    fn offer(&mut self, length: u32) -> bool {
        let Some(at) = self.rx_free.pop() else { return false };
        let half = length / 2;
        let Some(head) = self.machine.queues[0]
            .post(&[Buffer::Writable(at, half), Buffer::Writable(at + u64::from(half), length - half)])
        else {
            self.rx_free.push(at);
            return false;
        };
        self.rx.insert(head, (at, length));
        self.machine.kick(0);
        true
    }

    fn send(&mut self, frame: &[u8]) -> bool {
        let Some(at) = self.tx_free.pop() else { return false };
        self.machine.put(at, &HEADER);
        self.machine.put(at + 12, frame);
        let buffers = [Buffer::Readable(at, 12), Buffer::Readable(at + 12, frame.len() as u32)];
        let head = self.machine.queues[1].post(&buffers).unwrap();
        self.tx.insert(head, at);
        self.machine.kick(1);
        true
    }

    fn take_in(&mut self) {
        while let Some((head, length)) = self.machine.queues[0].take_used() {
            let (at, room) = self.rx.remove(&head).unwrap();
            assert!(length <= room);
            let bytes = self.machine.get(at, length as usize);
            self.rx_free.push(at);
            let (missing, mut frame) = self.partial.take().unwrap_or_else(|| {
                let count = u16::from_le_bytes([bytes[10], bytes[11]]);
                assert!(count == 1 || self.mergeable);
                (count, vec![])
            });
            frame.extend(bytes);
            if missing > 1 {
                self.partial = Some((missing - 1, frame));
            } else {
                self.got.push_back(frame[12..].to_vec());
            }
        }
        assert!(self.partial.is_none(), "all chains of a frame are shown at once");
        while let Some((head, length)) = self.machine.queues[1].take_used() {
            assert_eq!(length, 0);
            self.tx_free.push(self.tx.remove(&head).unwrap());
        }
    }

    fn turn(&mut self) {
        self.machine.events.turn(&mut self.machine.device, Duration::from_millis(10));
        self.take_in();
    }

    /// Turns until nothing happens any more.
    fn settle(&mut self) {
        while self.machine.events.turn(&mut self.machine.device, Duration::from_millis(5)) > 0 {
            self.take_in();
        }
        self.take_in();
    }

    fn count(&self, name: &str) -> u64 {
        self.machine.device.counters().iter().find(|(n, _)| *n == name).unwrap().1
    }
}

fn frame(id: usize, length: usize) -> Vec<u8> {
    (0..length.max(14)).map(|i| (id * 7 + i + (i >> 8)) as u8).collect()
}

fn give(socket: &UnixDatagram, frame: &[u8]) -> bool {
    match socket.send(&[HEADER.as_slice(), frame].concat()) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    }
}

fn receive(socket: &UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = vec![0; FRAME_MAX + 1];
    match socket.recv(&mut bytes) {
        Ok(length) => Some(bytes[12..length].to_vec()),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            None
        }
    }
}

#[test]
fn the_configuration_tells_address_link_and_mtu() {
    let (card, _tap) = Card::on_socket(0, false);
    let mut config = [0; 16];
    card.machine.device.config().read(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0xdc, 5, 0, 0, 0, 0]);
}

/// Pages that were noted as written since they were asked for last, by number.
fn take_noted(card: &Card) -> Vec<u64> {
    let mut words = vec![0u64; 1 << 10];
    for region in card.machine.memory.iter() {
        let map = region.bitmap().map();
        map.track(usize::try_from(region.len()).unwrap());
        map.take_into(&mut words);
    }
    (0..64 * words.len() as u64).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1).collect()
}

#[test]
fn what_a_frame_fills_is_noted_also_in_buffers_that_were_held_over_a_snapshot() {
    let (mut card, tap) = Card::on_socket(MRG_RXBUF | GUEST_CSUM | GUEST_TSO4, true);
    take_noted(&card);
    for _ in 0..60 {
        assert!(card.offer(1536));
    }
    card.settle();
    let offered = card.rx.clone();
    take_noted(&card);
    assert!(give(&tap, &frame(0, 9000)));
    card.settle();
    assert_eq!(card.count("received_copied"), 0);
    let filled: Vec<u64> = offered
        .iter()
        .filter(|(head, _)| !card.rx.contains_key(head))
        .map(|(_, (at, _))| at / 4096)
        .collect();
    assert_eq!(filled.len(), 6);
    let noted = take_noted(&card);
    assert!(filled.iter().all(|page| noted.contains(page)), "{filled:?} {noted:?}");
}

#[test]
fn a_long_frame_is_spread_over_mergeable_buffers() {
    for buffers in [20, 60] {
        let (mut card, tap) = Card::on_socket(MRG_RXBUF | GUEST_CSUM | GUEST_TSO4, true);
        for _ in 0..buffers {
            assert!(card.offer(1536));
        }
        for (id, length) in [14, 1524, 1525, 9000, 12000].into_iter().enumerate() {
            assert!(give(&tap, &frame(id, length)));
        }
        card.settle();
        for (id, length) in [14, 1524, 1525, 9000, 12000].into_iter().enumerate() {
            assert!(card.got.pop_front().unwrap() == frame(id, length), "{length}");
        }
        assert!(buffers == 60 || card.count("received_copied") > 0);
    }
}

#[test]
fn without_mergeable_buffers_an_overlong_frame_is_dropped_and_the_next_one_passes() {
    let (mut card, tap) = Card::on_socket(0, true);
    card.offer(1526);
    card.offer(1526);
    assert!(give(&tap, &frame(0, 1515)));
    assert!(give(&tap, &frame(1, 1514)));
    assert!(give(&tap, &frame(2, 60)));
    card.settle();
    assert_eq!(card.got, [frame(1, 1514), frame(2, 60)]);
    assert_eq!(card.count("received_dropped"), 1);
}

#[test]
fn frames_of_the_guest_reach_the_tap_and_nonsense_is_given_back_unused() {
    let (mut card, tap) = Card::on_socket(CSUM, false);
    card.send(&frame(0, 60));
    card.send(&frame(1, 65000));
    assert!(receive(&tap).unwrap() == frame(0, 60));
    assert!(receive(&tap).unwrap() == frame(1, 65000));
    let at = card.machine.buffers;
    for length in [1, 11, 12, FRAME_MAX as u32 + 1] {
        card.machine.queues[1].post(&[Buffer::Readable(at, length)]).unwrap();
    }
    card.machine.queues[1].post(&[Buffer::Writable(at, 100)]).unwrap();
    card.machine.kick(1);
    assert_eq!(
        (0..5).filter_map(|_| card.machine.queues[1].take_used()).filter(|used| used.1 == 0).count(),
        5
    );
    assert!(receive(&tap).is_none());
    assert_eq!(card.count("sent_dropped"), 5);
    assert_eq!(card.machine.interrupts.reset_count(), 0);
}

#[test]
fn a_full_queue_and_a_full_tap_do_not_freeze() {
    for event_idx in [false, true] {
        let (mut card, tap) = Card::on_socket(MRG_RXBUF, event_idx);
        // Frames for the guest until nothing more fits anywhere, while the guest has no buffers ...
        let mut given = 0;
        while give(&tap, &frame(given, 500)) {
            given += 1;
            card.settle();
        }
        // ... and frames from the guest until the tap takes no more.
        let mut sent = 0;
        while card.send(&frame(sent, 700)) {
            sent += 1;
            card.settle();
        }
        assert_eq!(card.count("received_frames"), 0);
        assert!(card.count("sent_frames") < sent as u64);
        assert_eq!(card.machine.events.turn(&mut card.machine.device, Duration::ZERO), 0, "it does not spin");
        // Room on one side, then on the other, one piece at a time.
        let mut got = 0;
        for _ in 0..given {
            card.offer(512);
            card.turn();
            while let Some(next) = card.got.pop_front() {
                assert_eq!(next, frame(got, 500));
                got += 1;
            }
        }
        for id in 0..sent {
            let mut next = receive(&tap);
            while next.is_none() {
                card.turn();
                next = receive(&tap);
            }
            assert_eq!(next.unwrap(), frame(id, 700));
        }
        assert_eq!(got, given);
        card.settle();
        assert!(card.tx.is_empty());
    }
}

#[test]
fn a_tap_that_is_gone_takes_the_link_down_and_nothing_spins() {
    let (mut card, tap) = Card::on_socket(0, true);
    card.offer(1526);
    drop(tap);
    card.send(&frame(0, 60));
    card.settle();
    let mut status = [0xff; 2];
    card.machine.device.config().read(6, &mut status);
    assert_eq!(status, [0, 0]);
    assert_eq!(card.machine.interrupts.config_count(), 1);
    assert_eq!(card.machine.events.watched(), 1, "its turn only");
    card.send(&frame(1, 60));
    card.settle();
    assert!(card.tx.is_empty(), "frames are given back");
}

#[test]
fn a_paused_or_reset_card_goes_on_afterwards() {
    let (mut card, tap) = Card::on_socket(0, true);
    card.offer(1526);
    card.machine.device.on_pause(true, &mut card.machine.events);
    assert!(give(&tap, &frame(0, 60)));
    card.settle();
    assert_eq!(card.got.len(), 0);
    card.machine.device.on_pause(false, &mut card.machine.events);
    card.settle();
    assert_eq!(card.got, [frame(0, 60)]);
    card.machine.reset();
    assert_eq!(card.machine.events.watched(), 0);
    assert!(give(&tap, &frame(1, 60)));
    card.machine.activate();
    (card.rx, card.got) = Default::default();
    card.offer(1526);
    card.settle();
    assert_eq!(card.got, [frame(1, 60)]);
}

#[test]
fn empty_buffers_for_frames_stop_the_device() {
    let (mut card, tap) = Card::on_socket(MRG_RXBUF, true);
    let at = card.machine.buffers;
    card.machine.queues[0].post(&[Buffer::Readable(at, 100)]).unwrap();
    card.machine.kick(0);
    assert_eq!(card.machine.interrupts.reset_count(), 1);
    assert!(give(&tap, &frame(0, 60)));
    assert_eq!(card.machine.events.turn(&mut card.machine.device, Duration::ZERO), 0);
    let (mut card, tap) = Card::on_socket(MRG_RXBUF, true);
    card.machine.queues[0].post(&[Buffer::Writable(at, 8)]).unwrap();
    card.machine.queues[0].post(&[Buffer::Writable(at + 100, 1500)]).unwrap();
    card.machine.kick(0);
    assert!(give(&tap, &frame(0, 60)));
    card.settle();
    assert_eq!(card.machine.interrupts.reset_count(), 1, "no place for the number of buffers");
}

#[test]
fn what_cannot_be_a_card_is_refused() {
    let (ours, _theirs) = UnixDatagram::pair().unwrap();
    assert!(matches!(Tap::new(ours.into()), Err(TapError::NotATap(_))));
    let tap = || Tap::from_datagrams(UnixDatagram::pair().unwrap().0.into()).unwrap();
    assert!(matches!(Net::new(Parts::new(tap(), MacAddr([1, 0, 0, 0, 0, 1]), 1500)), Err(NetError::Mac(_))));
    assert!(matches!(Net::new(Parts::new(tap(), MAC, 67)), Err(NetError::Mtu(67))));
}

#[derive(Debug, Clone)]
enum Step {
    Offer(u32),
    Give(usize),
    Send(usize),
    Receive,
    Turn,
    Pause(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => prop_oneof![Just(1536u32), 24u32..4000].prop_map(Step::Offer),
        3 => prop_oneof![14usize..1500, 1500usize..60_000].prop_map(Step::Give),
        3 => (14usize..20_000).prop_map(Step::Send),
        2 => Just(Step::Receive),
        2 => Just(Step::Turn),
        1 => any::<bool>().prop_map(Step::Pause),
    ];
    proptest::collection::vec(step, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// In whatever order both sides get room: every frame arrives once, whole and in order, and nobody is left waiting.
    #[test]
    fn no_frame_is_lost_or_doubled(steps in steps(), event_idx in any::<bool>()) {
        let (mut card, tap) = Card::on_socket(MRG_RXBUF | GUEST_CSUM | GUEST_TSO4, event_idx);
        let (mut given, mut sent): (VecDeque<Vec<u8>>, VecDeque<Vec<u8>>) = Default::default();
        let mut id = 0;
        for step in steps {
            id += 1;
            match step {
                Step::Offer(length) => { card.offer(length); }
                Step::Give(length) => if give(&tap, &frame(id, length)) { given.push_back(frame(id, length)); },
                Step::Send(length) => if card.send(&frame(id, length)) { sent.push_back(frame(id, length)); },
                Step::Receive => if let Some(got) = receive(&tap) {
                    let wanted = sent.pop_front().unwrap();
                    prop_assert!(got == wanted);
                },
                Step::Turn => { card.machine.events.turn(&mut card.machine.device, Duration::ZERO); }
                Step::Pause(paused) => card.machine.device.on_pause(paused, &mut card.machine.events),
            }
            card.take_in();
        }
        card.machine.device.on_pause(false, &mut card.machine.events);
        let mut idle = 0;
        while idle < 40 && (card.got.len() < given.len() || !sent.is_empty()) {
            let before = (card.got.len(), sent.len());
            while card.rx.len() < 60 && card.offer(1536) {}
            card.machine.events.turn(&mut card.machine.device, Duration::from_millis(1));
            card.take_in();
            while let Some(got) = receive(&tap) {
                let wanted = sent.pop_front().unwrap();
                prop_assert!(got == wanted);
            }
            idle = if before == (card.got.len(), sent.len()) { idle + 1 } else { 0 };
        }
        prop_assert!(card.got == given, "{} of {} frames arrived", card.got.len(), given.len());
        prop_assert!(sent.is_empty());
    }
}

// A real tap.

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// Queues of a tap in a network namespace of this thread, with address 10.99.0.1 and up; `None` with a line where that is
/// not possible.
pub(super) fn real_taps(count: usize) -> Option<Vec<OwnedFd>> {
    let skip = |what: &str| {
        println!("skipped: real tap: {what}: {}", std::io::Error::last_os_error());
        None
    };
    // SAFETY: affects this thread only, which ends with the test.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return skip("no network namespace");
    }
    let request = |fields: &[u8]| {
        let mut request = [0u8; 40];
        request[..4].copy_from_slice(b"tap0");
        request[16..16 + fields.len()].copy_from_slice(fields);
        request
    };
    let several = if count > 1 { 0x100 } else { 0 };
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | 0x4000 | several) as u16;
    let mut taps = vec![];
    for _ in 0..count {
        // SAFETY: the path is a string with a NUL.
        let fd = unsafe { libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        if fd < 0 {
            return skip("/dev/net/tun");
        }
        // SAFETY: just opened, owned by nobody else.
        let tap = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut argument = request(&flags.to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes a struct ifreq of 40 bytes.
        if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, argument.as_mut_ptr()) } != 0 {
            return skip("TUNSETIFF");
        }
        taps.push(tap);
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let address = [2, 0, 0, 0, 10, 99, 0, 1];
    let up = (libc::IFF_UP as u16).to_ne_bytes();
    for (name, fields) in [(0x8916, address.as_slice()), (0x8914, up.as_slice())] {
        let argument = request(fields);
        // SAFETY: SIOCSIFADDR and SIOCSIFFLAGS read a struct ifreq of 40 bytes.
        if unsafe { libc::ioctl(socket.as_raw_fd(), name, argument.as_ptr()) } != 0 {
            return skip("address");
        }
    }
    Some(taps)
}

#[test]
fn the_kernel_answers_an_arp_request_of_the_guest_over_a_real_tap() {
    let Some(tap) = real_taps(1).and_then(|mut taps| taps.pop()) else { return };
    let features = MRG_RXBUF | CSUM | GUEST_CSUM | GUEST_TSO4;
    let mut card =
        Card::new(Net::new(Parts::new(Tap::new(tap).unwrap(), MAC, 1500)).unwrap(), features, true);
    for _ in 0..60 {
        card.offer(1536);
    }
    let (ours, theirs) = ([10, 99, 0, 2], [10, 99, 0, 1]);
    let request =
        [[0xff; 6].as_slice(), &MAC.0, &[8, 6], &[0, 1, 8, 0, 6, 4, 0, 1], &MAC.0, &ours, &[0; 6], &theirs]
            .concat();
    card.machine.put(card.machine.buffers + 100 * SLOT, &[0; 12]);
    let at = card.tx_free.pop().unwrap();
    card.machine.put(at, &[[0; 12].as_slice(), &request].concat());
    card.machine.queues[1].post(&[Buffer::Readable(at, 12 + request.len() as u32)]).unwrap();
    card.machine.kick(1);
    let reply =
        |frame: &Vec<u8>| frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && frame[28..32] == theirs;
    let end = std::time::Instant::now() + Duration::from_secs(5);
    while !card.got.iter().any(reply) {
        assert!(std::time::Instant::now() < end, "no reply; {:?}", card.machine.device.counters());
        card.machine.events.turn(&mut card.machine.device, Duration::from_millis(10));
        while let Some((head, length)) = card.machine.queues[0].take_used() {
            let (at, _) = card.rx.remove(&head).unwrap();
            let bytes = card.machine.get(at, length as usize);
            card.got.push_back(bytes[12..].to_vec());
        }
    }
    assert_eq!(card.count("sent_frames"), 1);
}
