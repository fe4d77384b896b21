//! Streams through the device, with a guest that keeps the rules and one that does not.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::{LinkRecord, WorkloadExit};
use proptest::prelude::*;

use super::device::Device;
use super::guest_driver::{Buffer, Machine};
use super::vsock::{Vsock, VsockError};
use super::vsock_link::LinkSender;
use super::vsock_packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::snapshot::codec::Reader;

const CID: u32 = 42;
/// What the guest promises per stream.
pub(super) const GUEST_BUFFER: u32 = 10_000;
const RX_BUFFER: u32 = 4096;

pub(super) struct Guest {
    pub(super) machine: Machine<Vsock>,
    sender: LinkSender,
    records: Receiver<LinkRecord>,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
    pub(super) inbox: VecDeque<(Header, Vec<u8>)>,
    rx: BTreeMap<u16, u64>,
    rx_free: Vec<u64>,
    tx: BTreeMap<u16, u64>,
    tx_free: Vec<u64>,
}

impl Guest {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let (to_us, records) = channel();
        let on_link = Box::new(move |record| to_us.send(record).unwrap());
        let (device, sender) = Vsock::new(CID, listener.into(), on_link).unwrap();
        let machine = Machine::start(device, 0, true);
        let (rx, tx) = (BTreeMap::new(), BTreeMap::new());
        let inbox = VecDeque::new();
        let (rx_free, tx_free) = (vec![], vec![]);
        let mut guest =
            Self { machine, sender, records, path, _directory: directory, inbox, rx, rx_free, tx, tx_free };
        guest.make_buffers();
        guest.offer(32);
        guest
    }

    fn make_buffers(&mut self) {
        let base = self.machine.buffers;
        (self.inbox, self.rx, self.tx) = Default::default();
        self.rx_free = (0..64).map(|i| base + i * 0x2000).collect();
        self.tx_free = (0..16).map(|i| base + 0x10_0000 + i * 0x2_0000).collect();
    }

    /// Offers up to `count` buffers for packets, and takes in those that arrived.
    pub(super) fn offer(&mut self, count: usize) {
        for _ in 0..count {
            let Some(at) = self.rx_free.pop() else { break };
            let buffers = [Buffer::Writable(at, 44), Buffer::Writable(at + 44, RX_BUFFER)];
            let head = self.machine.queues[0].post(&buffers).unwrap();
            self.rx.insert(head, at);
        }
        self.machine.kick(0);
    }

    pub(super) fn take_in(&mut self) {
        while let Some((head, length)) = self.machine.queues[0].take_used() {
            let at = self.rx.remove(&head).unwrap();
            let bytes = self.machine.get(at, length as usize);
            let header = header_of(&bytes[..44]);
            assert_eq!(header.length, length - 44);
            assert_eq!((header.source_cid, header.destination_cid), (2, u64::from(CID)));
            self.inbox.push_back((header, bytes[44..].to_vec()));
            self.rx_free.push(at);
        }
        while let Some((head, _)) = self.machine.queues[1].take_used() {
            let at = self.tx.remove(&head).unwrap();
            self.tx_free.push(at);
        }
    }

    pub(super) fn turn(&mut self) {
        self.machine.events.turn(&mut self.machine.device, Duration::from_millis(5));
        self.take_in();
    }

    #[track_caller]
    pub(super) fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(Instant::now() < end, "nothing happened for twenty seconds");
            self.turn();
            self.offer(32);
        }
    }

    #[track_caller]
    pub(super) fn packet(&mut self) -> (Header, Vec<u8>) {
        self.until(|guest| !guest.inbox.is_empty());
        self.inbox.pop_front().unwrap()
    }

    /// Lets the device do all it wants to do, and says what the guest got meanwhile.
    fn settle(&mut self) -> Vec<Header> {
        while self.machine.events.turn(&mut self.machine.device, Duration::from_millis(20)) > 0 {
            self.take_in();
            self.offer(32);
        }
        self.take_in();
        self.inbox.drain(..).map(|(header, _)| header).collect()
    }

    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        self.until(|guest| !guest.tx_free.is_empty());
        let at = self.tx_free.pop().unwrap();
        self.machine.put(at, &header.to_bytes());
        self.machine.put(at + 44, payload);
        let mut buffers = vec![Buffer::Readable(at, 44)];
        if !payload.is_empty() {
            buffers.push(Buffer::Readable(at + 44, payload.len() as u32));
        }
        let head = self.machine.queues[1].post(&buffers).unwrap();
        self.tx.insert(head, at);
        self.machine.kick(1);
        self.take_in();
    }

    fn connect(&self, line: &str) -> UnixStream {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        client
    }

    /// An open stream: the client and the guest's header for it.
    pub(super) fn stream(&mut self, port: u32) -> (UnixStream, Header) {
        let mut client = self.connect(&format!("CONNECT {port}\n"));
        let (request, _) = self.packet();
        assert_eq!((request.operation, request.destination_port), (Operation::Request, port));
        let header = answer(&request, Operation::Response);
        self.send(header, &[]);
        let expected = format!("OK {}\n", request.source_port);
        let mut line = vec![0; expected.len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, expected.as_bytes());
        (client, header)
    }

    /// What the client reads until its end.
    fn rest_of(&mut self, client: &mut UnixStream) -> Vec<u8> {
        client.set_nonblocking(true).unwrap();
        let mut all = vec![];
        self.until(|_| match client.read_to_end(&mut all) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                false
            }
        });
        all
    }
}

fn header_of(bytes: &[u8]) -> Header {
    let memory = super::guest_driver::guest_memory(0x4000);
    vm_memory::Bytes::write_slice(&memory, bytes, vm_memory::GuestAddress(0x2000)).unwrap();
    let mut driver = super::guest_driver::DriverQueue::new(&memory, 0x1000, 1, false);
    driver.post(&[Buffer::Readable(0x2000, 44)]).unwrap();
    let chain = driver.device_side(0).pop().unwrap().unwrap();
    Header::read(&mut chain.reader(&memory)).unwrap()
}

fn answer(header: &Header, operation: Operation) -> Header {
    Header { operation, buffer_size: GUEST_BUFFER, ..header.reset_for() }
}

pub(super) fn data(header: &Header, payload: &[u8]) -> Header {
    Header { operation: Operation::Data, length: payload.len() as u32, ..*header }
}

pub(super) fn shutdown(header: &Header, flags: u32) -> Header {
    Header { operation: Operation::Shutdown, flags, ..*header }
}

pub(super) fn from_guest(port: u32, operation: Operation) -> Header {
    Header {
        source_cid: u64::from(CID),
        destination_cid: 2,
        source_port: 5000,
        destination_port: port,
        length: 0,
        kind: 1,
        operation,
        flags: 0,
        buffer_size: GUEST_BUFFER,
        forwarded: 0,
    }
}

#[test]
fn bytes_pass_both_ways_and_halves_end_separately() {
    let mut guest = Guest::new();
    let (mut client, header) = guest.stream(1025);
    client.write_all(b"to the guest").unwrap();
    let (packet, payload) = guest.packet();
    assert_eq!((packet.operation, payload.as_slice()), (Operation::Data, b"to the guest".as_slice()));
    client.shutdown(Shutdown::Write).unwrap();
    let (packet, _) = guest.packet();
    assert_eq!((packet.operation, packet.flags), (Operation::Shutdown, SHUTDOWN_SEND));
    guest.send(data(&header, b"to the host"), b"to the host");
    guest.send(shutdown(&header, SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]);
    assert_eq!(guest.rest_of(&mut client), b"to the host");
    assert_eq!(guest.packet().0.operation, Operation::Reset);
    assert_eq!(guest.machine.events.watched(), 3, "nothing is left of the stream");
}

#[test]
fn a_client_may_write_before_the_guest_has_answered() {
    let mut guest = Guest::new();
    let mut client = guest.connect("CONNECT 7\nearly bytes");
    let (request, _) = guest.packet();
    assert_eq!(guest.settle(), []);
    guest.send(answer(&request, Operation::Response), &[]);
    assert_eq!(guest.packet().1, b"early bytes");
    let mut line = [0; 3];
    client.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK ");
}

#[test]
fn a_line_that_arrives_in_pieces_is_a_line() {
    let mut guest = Guest::new();
    let mut client = guest.connect("CONN");
    assert_eq!(guest.settle(), []);
    client.write_all(b"ECT 9").unwrap();
    assert_eq!(guest.settle(), []);
    client.write_all(b"9\n").unwrap();
    assert_eq!(guest.packet().0.destination_port, 99);
}

#[test]
fn a_client_that_asks_for_nonsense_is_closed() {
    let mut guest = Guest::new();
    for line in [
        "CONNECT \n",
        "CONNECT x\n",
        "CONNECT 1 \n",
        "CONNECT -1\n",
        "CONNECT +1\n",
        "connect 1\n",
        "\n",
        "CONNECT 4294967296\n",
        "GET / HTTP/1.1\n",
        "CONNECT 00000000000000000000000000000001\n",
    ] {
        let mut client = guest.connect(line);
        client.set_nonblocking(true).unwrap();
        let mut byte = [0];
        guest.until(|_| match client.read(&mut byte) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        });
    }
    let client = guest.connect("CONNECT 1");
    client.shutdown(Shutdown::Write).unwrap();
    guest.until(|guest| guest.machine.events.watched() == 3);
    assert_eq!(guest.settle(), []);
}

#[test]
fn silent_clients_are_closed_and_keep_nobody_out() {
    let mut guest = Guest::new();
    let mut silent: Vec<_> = (0..150).map(|_| guest.connect("")).collect();
    let began = Instant::now();
    assert_eq!(guest.settle(), []);
    assert!(guest.machine.events.watched() <= 3 + 128);
    guest.stream(1);
    assert!(began.elapsed() >= Duration::from_millis(1900));
    for client in &mut silent[..128] {
        assert_eq!(guest.rest_of(client), b"");
    }
}

#[test]
fn a_port_nobody_listens_on_closes_the_client() {
    let mut guest = Guest::new();
    let mut client = guest.connect("CONNECT 1026\n");
    let (request, _) = guest.packet();
    guest.send(answer(&request, Operation::Reset), &[]);
    assert_eq!(guest.rest_of(&mut client), b"");
    assert_eq!(guest.settle(), []);
}

#[test]
fn a_client_that_goes_away_ends_both_halves() {
    let mut guest = Guest::new();
    let (client, header) = guest.stream(1);
    drop(client);
    let flags = guest.settle().iter().fold(0, |flags, packet| flags | packet.flags);
    assert_eq!(flags, SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
    guest.send(answer(&header.reset_for(), Operation::Reset), &[]);
    assert_eq!(guest.settle(), []);
    assert_eq!(guest.machine.events.watched(), 3);
}

#[test]
fn what_belongs_to_no_stream_is_reset_or_dropped() {
    let mut guest = Guest::new();
    for operation in
        [Operation::Request, Operation::Response, Operation::Data, Operation::Shutdown, Operation::Unknown(9)]
    {
        guest.send(from_guest(2000, operation), &[]);
        let (reset, _) = guest.packet();
        assert_eq!(reset.operation, Operation::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (2000, 5000));
    }
    guest.send(Header { kind: 2, ..from_guest(1024, Operation::Request) }, &[]);
    assert_eq!(guest.packet().0.operation, Operation::Reset);
    guest.send(from_guest(2000, Operation::Reset), &[]);
    guest.send(Header { source_cid: 43, ..from_guest(1024, Operation::Request) }, &[]);
    guest.send(Header { destination_cid: 3, ..from_guest(1024, Operation::Request) }, &[]);
    guest.send(Header { length: 9, ..from_guest(1024, Operation::Data) }, b"8 bytes.");
    assert_eq!(guest.settle(), []);
    assert!(guest.machine.device.counters().contains(&("malformed", 3)));
}

#[test]
fn resets_for_a_guest_that_takes_none_are_bounded_and_all_come_in_the_end() {
    let mut guest = Guest::new();
    // All buffers of the guest are filled, then many packets more.
    let mut sent = 0;
    for _ in 0..400 {
        let Some(at) = guest.tx_free.pop() else { break };
        guest.machine.put(at, &from_guest(2000, Operation::Data).to_bytes());
        for _ in 0..25 {
            if let Some(head) = guest.machine.queues[1].post(&[Buffer::Readable(at, 44)]) {
                guest.tx.insert(head, at);
                sent += 1;
            }
        }
    }
    assert_eq!(sent, 256);
    guest.machine.kick(1);
    while guest.machine.events.turn(&mut guest.machine.device, Duration::from_millis(20)) > 0 {}
    let taken = std::iter::from_fn(|| guest.machine.queues[1].take_used()).count();
    assert_eq!(taken, 32 + 128, "as many as there are buffers and places for resets");
    let mut resets = 0;
    let end = Instant::now() + Duration::from_secs(10);
    let mut done = taken;
    while resets < 256 {
        assert!(Instant::now() < end, "{resets} resets");
        while let Some((head, _)) = guest.machine.queues[0].take_used() {
            guest.rx_free.push(guest.rx.remove(&head).unwrap());
            resets += 1;
        }
        done += std::iter::from_fn(|| guest.machine.queues[1].take_used()).count();
        guest.offer(8);
        guest.machine.events.turn(&mut guest.machine.device, Duration::from_millis(1));
    }
    assert_eq!(done, 256);
}

#[test]
fn the_link_carries_records_both_ways_and_the_newest_wins() {
    let mut guest = Guest::new();
    guest.sender.send(LinkRecord::Stop);
    guest.sender.send(LinkRecord::Stop);
    guest.settle();
    let first = from_guest(1024, Operation::Request);
    guest.send(first, &[]);
    assert_eq!(guest.packet().0.operation, Operation::Response);
    let (packet, payload) = guest.packet();
    assert_eq!((packet.operation, payload), (Operation::Data, LinkRecord::Stop.encode()));
    assert_eq!(guest.settle(), [], "the same record is not sent twice");

    let exit = LinkRecord::WorkloadExited(WorkloadExit::Code(3));
    let bytes = [LinkRecord::Started.encode(), LinkRecord::Ready.encode(), exit.encode()].concat();
    for part in bytes.chunks(5) {
        guest.send(data(&first, part), part);
    }
    let records: Vec<_> = guest.records.try_iter().collect();
    assert_eq!(records, [LinkRecord::Started, LinkRecord::Ready, exit]);

    let second = Header { source_port: 5001, ..first };
    guest.send(second, &[]);
    let answers: Vec<_> = guest.settle().iter().map(|h| (h.destination_port, h.operation)).collect();
    assert!(
        answers.contains(&(5000, Operation::Reset)) && answers.contains(&(5001, Operation::Response)),
        "{answers:?}"
    );
    guest.sender.send(LinkRecord::Stop);
    assert_eq!(guest.packet().0.destination_port, 5001);
    guest.send(data(&second, &[9, 0, 0, 0]), &[9, 0, 0, 0]);
    assert_eq!(guest.packet().0.operation, Operation::Reset);
    guest.send(second, &[]);
    assert_eq!(guest.packet().0.operation, Operation::Response, "after garbage it may connect again");
}

#[test]
fn a_link_without_credit_gets_its_record_when_there_is_some() {
    let mut guest = Guest::new();
    let request = Header { buffer_size: 3, ..from_guest(1024, Operation::Request) };
    guest.send(request, &[]);
    guest.sender.send(LinkRecord::Stop);
    let seen: Vec<_> = guest.settle().iter().map(|header| header.operation).collect();
    assert_eq!(seen, [Operation::Response, Operation::CreditRequest]);
    guest.send(Header { buffer_size: 4096, operation: Operation::CreditUpdate, ..request }, &[]);
    assert_eq!(guest.packet().1, LinkRecord::Stop.encode());
}

#[test]
fn a_guest_that_overruns_its_credit_loses_the_stream() {
    let mut guest = Guest::new();
    let (mut client, header) = guest.stream(1);
    let part = vec![7; 0x1_0000];
    // The client reads nothing: its socket fills, then our buffer, then there is no credit.
    for _ in 0..16 {
        guest.send(data(&header, &part), &part);
    }
    let seen = guest.settle();
    assert!(seen.iter().any(|packet| packet.operation == Operation::Reset));
    assert_eq!(guest.machine.events.watched(), 3, "the stream is gone");
    let all = guest.rest_of(&mut client);
    assert!(all.iter().all(|byte| *byte == 7));
    assert!(all.len() < 16 * part.len());
}

#[test]
fn bytes_behind_a_gap_never_reach_the_host() {
    let mut guest = Guest::new();
    let (mut client, header) = guest.stream(1);
    // The guest's buffers are used up, so that the reset of its stream has to wait.
    while !guest.rx.is_empty() {
        guest.send(from_guest(2000, Operation::Data), &[]);
        guest.machine.events.turn(&mut guest.machine.device, Duration::from_millis(1));
        guest.take_in();
    }
    let part = vec![7; 0x1_0000];
    for _ in 0..8 {
        guest.send(data(&header, &part), &part);
    }
    // Now the host has room again, but bytes are missing.
    client.set_nonblocking(true).unwrap();
    let mut all = vec![];
    assert_eq!(client.read_to_end(&mut all).unwrap_err().kind(), ErrorKind::WouldBlock);
    guest.machine.events.turn(&mut guest.machine.device, Duration::from_millis(10));
    guest.send(data(&header, b"behind"), b"behind");
    guest.until(|guest| guest.machine.events.watched() == 3);
    all.extend(guest.rest_of(&mut client));
    assert!(all.len() < 8 * part.len() && all.iter().all(|byte| *byte == 7));
}

#[test]
fn a_guest_that_only_sends_gets_its_credit_back() {
    let mut guest = Guest::new();
    let (mut client, header) = guest.stream(1);
    let part = vec![7; 0x8000];
    let mut buffer = vec![0; part.len()];
    let mut known = 0;
    for round in 1..=20 {
        guest.send(data(&header, &part), &part);
        client.read_exact(&mut buffer).unwrap();
        guest.until(|guest| {
            let updates =
                guest.inbox.drain(..).filter(|(packet, _)| packet.operation == Operation::CreditUpdate);
            known = updates.map(|(packet, _)| packet.forwarded).max().unwrap_or(known);
            // Never more than one part is missing from what the guest knows: it can always send the next one.
            known + 0x8000 >= round * 0x8000
        });
    }
}

#[test]
fn a_client_that_reads_nothing_holds_up_nobody_else() {
    let mut guest = Guest::new();
    let (mut stuck, header) = guest.stream(1);
    let part = vec![7; 0x4000];
    let mut sent = 0;
    let mut forwarded = 0;
    // As much as there is credit for: its socket is full, and so is our buffer.
    while sent + 0x4000 - forwarded <= 0x1_0000 {
        guest.send(data(&header, &part), &part);
        sent += 0x4000;
        guest.turn();
        forwarded = guest.inbox.drain(..).map(|(packet, _)| packet.forwarded).max().unwrap_or(forwarded);
        guest.offer(32);
    }
    stuck.write_all(b"still writes").unwrap();
    assert_eq!(guest.packet().1, b"still writes");
    let (mut other, header) = guest.stream(2);
    guest.send(data(&header, b"served"), b"served");
    let mut line = [0; 6];
    other.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"served");
    let mut rest = vec![0; sent as usize];
    stuck.set_nonblocking(true).unwrap();
    let mut done = 0;
    guest.until(|_| {
        if let Ok(count) = stuck.read(&mut rest[done..]) {
            done += count;
        }
        done == sent as usize
    });
    assert!(rest.iter().all(|byte| *byte == 7));
}

#[test]
fn a_reset_device_closes_its_clients_and_serves_new_ones() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.stream(1);
    guest.machine.reset();
    assert_eq!(guest.machine.events.watched(), 0);
    let mut all = vec![];
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"");
    guest.machine.activate();
    guest.make_buffers();
    guest.offer(32);
    guest.stream(1);
}

#[test]
fn a_paused_device_loses_no_event() {
    let mut guest = Guest::new();
    let (mut client, header) = guest.stream(1);
    guest.machine.device.on_pause(true, &mut guest.machine.events);
    client.write_all(b"while paused").unwrap();
    guest.send(data(&header, b"also"), b"also");
    assert_eq!(guest.settle(), []);
    guest.machine.device.on_pause(false, &mut guest.machine.events);
    assert_eq!(guest.packet().1, b"while paused");
    let mut line = [0; 4];
    client.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"also");
}

#[test]
fn what_cannot_be_a_vsock_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let listener = || UnixListener::bind(directory.path().join("a")).unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let bound = listener();
        std::fs::remove_file(directory.path().join("a")).unwrap();
        assert!(
            matches!(Vsock::new(cid, bound.into(), Box::new(|_| ())), Err(VsockError::Cid(c)) if c == cid)
        );
    }
    let (socket, _other) = UnixStream::pair().unwrap();
    assert!(matches!(Vsock::new(3, socket.into(), Box::new(|_| ())), Err(VsockError::Listener)));
}

#[test]
fn many_streams_at_once_do_not_mix() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..50).map(|port| (guest.stream(port), port as u8)).collect();
    for ((client, _), byte) in &mut streams {
        client.write_all(&[*byte; 5000]).unwrap();
    }
    let mut got: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    while got.values().map(Vec::len).sum::<usize>() < 50 * 5000 {
        let (header, payload) = guest.packet();
        got.entry(header.destination_port).or_default().extend(payload);
    }
    for ((client, header), byte) in &mut streams {
        assert_eq!(got[&u32::from(*byte)], [*byte; 5000]);
        guest.send(data(header, &[*byte; 9]), &[*byte; 9]);
        let mut back = [0; 9];
        client.read_exact(&mut back).unwrap();
        assert_eq!(back, [*byte; 9]);
    }
}

fn any_packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let operation = prop_oneof![
        Just(Operation::Request),
        Just(Operation::Response),
        Just(Operation::Reset),
        Just(Operation::Shutdown),
        Just(Operation::Data),
        Just(Operation::CreditUpdate),
        Just(Operation::CreditRequest),
        (0u16..12).prop_map(Operation::Unknown),
    ];
    let ports = (5000u32..5003, prop_oneof![Just(1024u32), Just(2000), (1u32 << 30)..(1 << 30) + 3]);
    let numbers = (prop_oneof![Just(0u32), 0u32..600, Just(u32::MAX)], 0u32..5, any::<u32>());
    (operation, ports, numbers, proptest::collection::vec(any::<u8>(), 0..600)).prop_map(
        |(operation, (source_port, destination_port), (length, flags, credit), payload)| {
            let kind = if flags == 4 { 7 } else { 1 };
            let length = if length < 300 { payload.len() as u32 } else { length };
            let header = Header {
                source_port,
                destination_port,
                length,
                kind,
                operation,
                flags,
                buffer_size: credit,
                forwarded: credit.rotate_left(7),
                ..from_guest(0, operation)
            };
            (header, payload)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whatever a guest sends, the device stays in bounds and goes on.
    #[test]
    fn random_packets_never_panic(packets in proptest::collection::vec(any_packet(), 1..60)) {
        let mut guest = Guest::new();
        let clients: Vec<_> = (5000..5003).map(|port| guest.connect(&format!("CONNECT {port}\nhello"))).collect();
        for (header, payload) in packets {
            guest.send(header, &payload);
            guest.offer(4);
        }
        guest.settle();
        prop_assert_eq!(guest.machine.interrupts.reset_count(), 0);
        drop(clients);
        guest.settle();
        guest.machine.reset();
        guest.machine.activate();
        guest.make_buffers();
        guest.offer(32);
        guest.stream(1);
    }
}

#[test]
fn a_restored_guest_is_told_once_that_its_streams_are_gone() {
    let mut guest = Guest::new();
    guest.machine.reset();
    guest.machine.device.restore(&mut Reader::new(&[])).unwrap();
    guest.machine.activate();
    let at = guest.machine.buffers + 0x40_0000;
    guest.machine.put(at, &[9; 16]);
    let mut post = |at| {
        let head = guest.machine.queues[2].post(&[Buffer::Writable(at, 8)]).unwrap();
        guest.machine.kick(2);
        (head, guest.machine.queues[2].take_used())
    };
    let (head, used) = post(at);
    assert_eq!(used, Some((head, 4)));
    assert_eq!(post(at + 8).1, None);
    assert_eq!(guest.machine.get(at, 16), [[0; 4].as_slice(), &[9; 12]].concat());
}
