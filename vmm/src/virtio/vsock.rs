//! Vsock device (virtio 1.3 section 5.10): streams between the guest and clients of a Unix socket.
//!
//! * A host client connects to the listener and writes `CONNECT <port>\n`. When something in the guest accepts on that port
//!   it gets `OK <our port>\n` and from then on the bytes of the stream; otherwise its connection is closed.
//! * The guest connects to port [`LINK_PORT`] of the host: the guest link, whose other end is in here. Its connections to
//!   other ports go to the holder of the hook ([`super::vsock_hook`]), if there is one.
//!
//! ```text
//!  listener ─► Waiting (line, 2 s) ─► Stream ◄─► rx, tx queues
//!                                       ▲ ready: round robin over the streams with something for the guest
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::{LINK_PORT, LinkRecord};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::chain::{Chain, ChainError, Reader};
use super::device::{Activation, ConfigSpace, Device, DeviceKind, GuestMemory, Interrupt, Watch};
use super::failure::Failure;
use super::iovec::IoVecs;
use super::queue::{Queue, QueueError};
use super::socket;
use super::turn::Turn;
use super::vsock_clients::{CLIENT_EVENTS, Clients};
use super::vsock_hook::Hook;
use super::vsock_link::{LinkEnd, LinkSender, Outbox};
use super::vsock_packet::{HEADER_LENGTH, HOST_CID, Header, Operation, TYPE_STREAM};
use super::vsock_stream::{Ports, Stream};
use crate::snapshot::codec::{Invalid, Reader as StateReader};

/// Most streams, and clients that have not said yet what they want.
pub const STREAMS_MAX: usize = 1024;
/// Resets that wait for the guest to take them; behind that its packets wait.
const RESETS_MAX: usize = 128;
const PACKETS_PER_TURN: usize = 128;
const CLIENTS_PER_TURN: usize = 16;
/// How often deadlines are looked at while there are any.
const TICK: Duration = Duration::from_millis(500);
/// Our ports of streams that clients ask for.
const PORT_FIRST: u32 = 1 << 30;
const PORT_END: u32 = 1 << 31;

/// An event of the event queue (virtio 1.3 section 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const TURN: u64 = 0;
const LISTENER: u64 = 1;
const TIMER: u64 = 2;
const CLIENT_FIRST: u64 = 16;

/// Why there can be no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Reserved (virtio 1.3 section 5.10.4).
    #[error("context id {0} is reserved: a guest has 3 to 4294967294")]
    Cid(u32),
    /// The listener is none.
    #[error("the listener is not a listening Unix stream socket")]
    Listener,
    /// The listener cannot be made non-blocking.
    #[error("the listener cannot be made non-blocking")]
    NonBlocking(#[source] io::Error),
    /// The events of the device cannot be made.
    #[error("events of the device")]
    Event(#[source] io::Error),
}

/// Why the device stopped until its next reset.
#[derive(Debug, thiserror::Error)]
enum VsockFailure {
    #[error("queue")]
    Queue(#[from] QueueError),
    #[error("packet buffer")]
    Chain(#[from] ChainError),
    #[error("events of the device")]
    Event(#[source] io::Error),
}

/// The device.
pub struct Vsock {
    host: Host,
    config: ConfigSpace,
    active: Option<Active>,
    /// The guest's streams ended with the VM that it was copied from, and it has to be told.
    restored: bool,
    paused: bool,
    failure: Failure,
}

/// What stays over resets.
struct Host {
    cid: u64,
    listener: OwnedFd,
    hook: Option<Hook>,
    turn: Turn,
    timer: TimerFd,
    timer_runs: bool,
    outbox: Outbox,
    on_link: Box<dyn FnMut(LinkRecord) + Send>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    from_guest: u64,
    from_guest_bytes: u64,
    to_guest: u64,
    to_guest_bytes: u64,
    malformed: u64,
    resets: u64,
    opened: u64,
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    to_guest: Queue,
    from_guest: Queue,
    /// Until the guest was told that its streams are gone: where to tell it.
    events: Option<Queue>,
    /// A chain taken for a packet that did not come about.
    empty: Option<Chain>,
    buffers: IoVecs,
    clients: Clients,
    streams: BTreeMap<u64, Stream>,
    by_ports: BTreeMap<Ports, u64>,
    /// Streams with something for the guest.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    link: Option<u64>,
    next_id: u64,
    next_port: u32,
    guest_cid: u64,
}

impl Vsock {
    /// A device for the guest `cid` whose host side is `listener`, a listening Unix stream socket. `on_link` gets each
    /// record that the guest sends over its link; a guest sends as many as it likes, so it has to be bounded in what it keeps.
    ///
    /// # Errors
    /// What is wrong with the context id or the listener.
    pub fn new(
        cid: u32,
        listener: OwnedFd,
        on_link: Box<dyn FnMut(LinkRecord) + Send>,
    ) -> Result<(Self, LinkSender), VsockError> {
        if !(3..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        if !socket::is_unix_listener(listener.as_fd()) {
            return Err(VsockError::Listener);
        }
        socket::set_nonblocking(&listener).map_err(VsockError::NonBlocking)?;
        let turn = Turn::new().map_err(VsockError::Event)?;
        let timer = TimerFd::new().map_err(|e| VsockError::Event(e.into()))?;
        // An event may be left over from a timer that was stopped meanwhile: reading it must not wait.
        socket::set_nonblocking(&timer).map_err(VsockError::Event)?;
        let outbox = Outbox::default();
        let sender = LinkSender::new(Arc::clone(&outbox), turn.try_clone().map_err(VsockError::Event)?);
        let host = Host {
            cid: u64::from(cid),
            listener,
            hook: None,
            turn,
            timer,
            timer_runs: false,
            outbox,
            on_link,
            counts: Counts::default(),
        };
        let config = ConfigSpace::new(u64::from(cid).to_le_bytes().into());
        Ok((
            Self { host, config, active: None, restored: false, paused: false, failure: Failure::default() },
            sender,
        ))
    }

    /// Passes streams that the guest opens to ports of the host to the holder of the other end of `socket`.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn set_hook(&mut self, socket: OwnedFd) -> Result<(), VsockError> {
        self.host.hook = Some(Hook::new(socket).map_err(VsockError::NonBlocking)?);
        Ok(())
    }

    fn run(&mut self, watch: &mut dyn Watch) {
        let Some(active) = self.active.as_mut().filter(|_| !self.paused) else { return };
        let result = active.serve(&mut self.host, watch);
        self.end_turn(result, watch);
    }

    fn end_turn(&mut self, result: Result<bool, VsockFailure>, watch: &mut dyn Watch) {
        let Some(active) = self.active.as_mut() else { return };
        match result {
            Ok(true) => self.host.turn.ask(),
            Ok(false) => {}
            Err(error) => {
                self.failure.note(&error, &*active.interrupt);
                active.close_all(watch);
                active.to_guest = Queue::disabled(0);
                active.from_guest = Queue::disabled(1);
            }
        }
        self.host.set_timer(active.from_guest.is_enabled() && active.has_deadlines());
    }
}

impl Host {
    /// Lets the timer run while there are deadlines, so that an idle device costs nothing.
    fn set_timer(&mut self, wanted: bool) {
        if wanted == self.timer_runs {
            return;
        }
        let result = if wanted { self.timer.reset(TICK, Some(TICK)) } else { self.timer.clear() };
        if result.is_ok() {
            self.timer_runs = wanted;
        }
    }

    fn watch(&self, watch: &mut dyn Watch) -> io::Result<()> {
        self.turn.watch(watch, TURN)?;
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let listener = watch.add(self.listener.as_raw_fd(), edge.bits(), LISTENER);
        let timer = watch.add(self.timer.as_raw_fd(), EventSet::IN.bits(), TIMER);
        if listener.is_ok() && timer.is_ok() {
            return Ok(());
        }
        self.turn.unwatch(watch);
        if listener.is_ok() {
            watch.remove(self.listener.as_raw_fd());
        }
        if timer.is_ok() {
            watch.remove(self.timer.as_raw_fd());
        }
        listener.and(timer)
    }

    fn unwatch(&self, watch: &mut dyn Watch) {
        self.turn.unwatch(watch);
        watch.remove(self.listener.as_raw_fd());
        watch.remove(self.timer.as_raw_fd());
    }
}

impl Active {
    /// A turn; true when there is more to do than fits in it.
    fn serve(&mut self, host: &mut Host, watch: &mut dyn Watch) -> Result<bool, VsockFailure> {
        if !self.from_guest.is_enabled() {
            return Ok(false);
        }
        self.tell_reset()?;
        // Records for the guest may have come from another thread.
        if let Some(id) = self.link {
            self.poke(id);
        }
        let more_clients = self.accept(host, watch);
        // Answers first: packets of the guest wait while there are too many resets for it.
        let mut more_to_guest = self.send_all(host, watch)?;
        let more_from_guest = self.receive_all(host, watch)?;
        more_to_guest |= self.send_all(host, watch)?;
        for queue in [&mut self.to_guest, &mut self.from_guest] {
            if queue.publish()? {
                self.interrupt.used(queue.index());
            }
        }
        Ok(more_clients || more_to_guest || (more_from_guest && self.resets.len() < RESETS_MAX))
    }

    /// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7), as soon as the driver has room for it.
    fn tell_reset(&mut self) -> Result<(), VsockFailure> {
        let Some(events) = self.events.as_mut() else { return Ok(()) };
        // A driver that adds its buffer just now kicks for it.
        let first = events.pop()?;
        let found = if first.is_none() && events.enable_kicks()? { events.pop()? } else { first };
        let Some(chain) = found else { return Ok(()) };
        chain.writer(&self.memory).write(&EVENT_TRANSPORT_RESET.to_le_bytes())?;
        events.add_used(chain, 4)?;
        if events.publish()? {
            self.interrupt.used(events.index());
        }
        self.events = None;
        Ok(())
    }

    /// Puts a stream that has something for the guest on the list.
    fn poke(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.queued
            && stream.wants_to_send()
        {
            stream.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Looks at a stream after something happened to it.
    fn tend(&mut self, id: u64, watch: &mut dyn Watch) {
        let Some(stream) = self.streams.get(&id) else { return };
        if !stream.is_known_to_guest() {
            let ports = stream.ports();
            if self.by_ports.get(&ports) == Some(&id) {
                self.by_ports.remove(&ports);
            }
        }
        if !stream.is_over() {
            return self.poke(id);
        }
        if let Some(socket) = stream.socket() {
            watch.remove(socket.as_raw_fd());
        }
        self.streams.remove(&id);
        if self.link == Some(id) {
            self.link = None;
        }
    }

    // The host's side.

    fn accept(&mut self, host: &Host, watch: &mut dyn Watch) -> bool {
        for _ in 0..CLIENTS_PER_TURN {
            if self.is_full() {
                return false;
            }
            let id = self.next_id;
            if !self.clients.accept(host.listener.as_fd(), id, watch) {
                return false;
            }
            self.next_id += 1;
            // What was there before the watch began is reported by its first event; looking now saves that round.
            self.on_line(id, 0, watch);
        }
        true
    }

    fn is_full(&self) -> bool {
        self.streams.len() + self.clients.count() >= STREAMS_MAX
    }

    /// Looks whether a client has written its line.
    fn on_line(&mut self, id: u64, events: u32, watch: &mut dyn Watch) {
        if let Some((port, socket)) = self.clients.on_line(id, events, watch) {
            match self.free_port() {
                Some(ours) => self.open(id, (ours, port), socket),
                None => watch.remove(socket.as_raw_fd()),
            }
        }
    }

    fn open(&mut self, id: u64, ports: Ports, socket: OwnedFd) {
        self.by_ports.insert(ports, id);
        self.streams.insert(id, Stream::from_host(ports, self.guest_cid, socket));
        self.poke(id);
    }

    fn free_port(&mut self) -> Option<u32> {
        // One more than there can be streams: one of these ports is free.
        for _ in 0..=STREAMS_MAX {
            let port = self.next_port;
            self.next_port = if port + 1 == PORT_END { PORT_FIRST } else { port + 1 };
            if self.by_ports.range((port, 0)..=(port, u32::MAX)).next().is_none() {
                return Some(port);
            }
        }
        None
    }

    fn on_socket(&mut self, id: u64, events: u32, watch: &mut dyn Watch) {
        if self.clients.contains(id) {
            self.on_line(id, events, watch);
        } else if let Some(stream) = self.streams.get_mut(&id) {
            stream.on_socket(events);
            self.tend(id, watch);
        }
    }

    fn has_deadlines(&self) -> bool {
        self.clients.have_deadlines() || self.streams.values().any(|s| s.deadline().is_some())
    }

    fn on_tick(&mut self, watch: &mut dyn Watch) {
        let now = Instant::now();
        self.clients.on_tick(now, watch);
        let late = self.streams.iter_mut().filter(|(_, s)| s.deadline().is_some_and(|d| d <= now));
        let late: Vec<u64> = late.map(|(id, stream)| (stream.on_deadline(), *id).1).collect();
        for id in late {
            self.tend(id, watch);
        }
    }

    fn close_all(&mut self, watch: &mut dyn Watch) {
        self.clients.close_all(watch);
        for stream in std::mem::take(&mut self.streams).into_values() {
            if let Some(socket) = stream.socket() {
                watch.remove(socket.as_raw_fd());
            }
        }
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
        self.link = None;
    }

    // The guest's side.

    /// Sends what there is to the guest; true when there is more and room for it.
    fn send_all(&mut self, host: &mut Host, watch: &mut dyn Watch) -> Result<bool, VsockFailure> {
        for _ in 0..PACKETS_PER_TURN {
            if self.resets.is_empty() && self.ready.is_empty() {
                return Ok(false);
            }
            let Some(chain) = self.take_empty()? else { return Ok(false) };
            let length = self.fill(&chain, host, watch)?;
            if let Some(length) = length {
                host.counts.to_guest += 1;
                host.counts.to_guest_bytes += u64::from(length.saturating_sub(HEADER_LENGTH));
                self.to_guest.add_used(chain, length)?;
            } else {
                self.empty = Some(chain);
            }
        }
        Ok(!self.resets.is_empty() || !self.ready.is_empty())
    }

    fn take_empty(&mut self) -> Result<Option<Chain>, QueueError> {
        if let Some(chain) = self.empty.take() {
            return Ok(Some(chain));
        }
        loop {
            if let Some(chain) = self.to_guest.pop()? {
                return Ok(Some(chain));
            }
            if !self.to_guest.enable_kicks()? {
                return Ok(None);
            }
        }
    }

    fn fill(
        &mut self,
        chain: &Chain,
        host: &mut Host,
        watch: &mut dyn Watch,
    ) -> Result<Option<u32>, VsockFailure> {
        if let Some(reset) = self.resets.pop_front() {
            host.counts.resets += 1;
            chain.writer(&self.memory).write(&reset.to_bytes())?;
            return Ok(Some(HEADER_LENGTH));
        }
        let Some(id) = self.ready.pop_front() else { return Ok(None) };
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(None) };
        stream.queued = false;
        let length = stream.send(chain, &self.memory, &mut self.buffers)?;
        self.tend(id, watch);
        Ok(length)
    }

    /// Takes packets of the guest; true when there are more.
    fn receive_all(&mut self, host: &mut Host, watch: &mut dyn Watch) -> Result<bool, VsockFailure> {
        for _ in 0..PACKETS_PER_TURN {
            if self.resets.len() >= RESETS_MAX {
                return Ok(true);
            }
            let Some(chain) = self.from_guest.pop()? else {
                if self.from_guest.enable_kicks()? {
                    continue;
                }
                return Ok(false);
            };
            let memory = Arc::clone(&self.memory);
            self.receive(chain.reader(&memory), host, watch)?;
            self.from_guest.add_used(chain, 0)?;
        }
        Ok(true)
    }

    fn receive(
        &mut self,
        mut reader: Reader<'_>,
        host: &mut Host,
        watch: &mut dyn Watch,
    ) -> Result<(), VsockFailure> {
        let header = Header::read(&mut reader)?;
        host.counts.from_guest += 1;
        let length = if header.operation == Operation::Data { header.length as usize } else { 0 };
        let ours = header.source_cid == host.cid && header.destination_cid == HOST_CID;
        let Some(payload) = reader.split(length).ok().filter(|_| ours) else {
            // Not from this guest, not for this host, or shorter than it says: there is nobody to answer.
            host.counts.malformed += 1;
            return Ok(());
        };
        host.counts.from_guest_bytes += length as u64;
        if header.kind != TYPE_STREAM {
            self.refuse(&header);
            return Ok(());
        }
        let ports = (header.destination_port, header.source_port);
        if let Some(id) = self.by_ports.get(&ports).copied() {
            if let Some(stream) = self.streams.get_mut(&id) {
                let was_open = stream.is_open();
                stream.on_packet(&header, payload, &mut self.buffers, &mut *host.on_link)?;
                host.counts.opened += u64::from(!was_open && stream.is_open());
            }
            self.tend(id, watch);
        } else if header.operation == Operation::Request && header.destination_port == LINK_PORT {
            self.open_link(&header, host, watch);
        } else if header.operation == Operation::Request {
            self.open_hook(&header, host, watch);
        } else {
            self.refuse(&header);
        }
        Ok(())
    }

    fn refuse(&mut self, header: &Header) {
        // A reset is not answered by a reset, or they would go on for ever.
        if header.operation != Operation::Reset {
            self.resets.push_back(header.reset_for());
        }
    }

    /// The guest opens a stream to a port of the host.
    fn open_hook(&mut self, request: &Header, host: &mut Host, watch: &mut dyn Watch) {
        let Some(hook) = host.hook.as_ref().filter(|_| !self.is_full()) else { return self.refuse(request) };
        let id = self.next_id;
        let opened = hook.open(request.destination_port).ok();
        let watched = opened.filter(|socket| watch.add(socket.as_raw_fd(), CLIENT_EVENTS.bits(), id).is_ok());
        let Some(socket) = watched else { return self.refuse(request) };
        self.next_id += 1;
        host.counts.opened += 1;
        let stream = Stream::from_guest(request, socket);
        self.by_ports.insert(stream.ports(), id);
        self.streams.insert(id, stream);
        self.poke(id);
    }

    /// The newest link wins: init that connects again has lost the one before.
    fn open_link(&mut self, request: &Header, host: &mut Host, watch: &mut dyn Watch) {
        if let Some(id) = self.link.take() {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.abort();
            }
            self.tend(id, watch);
        }
        if self.is_full() {
            return self.refuse(request);
        }
        let id = self.next_id;
        self.next_id += 1;
        host.counts.opened += 1;
        let stream = Stream::link(request, LinkEnd::new(&host.outbox));
        self.by_ports.insert(stream.ports(), id);
        self.streams.insert(id, stream);
        self.link = Some(id);
        self.poke(id);
    }
}

impl Device for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        // No bit means streams (virtio 1.3 section 5.10.3).
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn activate(&mut self, activation: Activation, watch: &mut dyn Watch) {
        let Activation { memory, queues, interrupt, .. } = activation;
        let mut queues = queues.into_iter();
        let mut next = |index| queues.next().unwrap_or_else(|| Queue::disabled(index));
        let (to_guest, from_guest) = (next(0), next(1));
        let events = std::mem::take(&mut self.restored).then(|| next(2));
        if let Err(error) = self.host.watch(watch) {
            self.failure.note(&VsockFailure::Event(error), &*interrupt);
            return;
        }
        let memory = Arc::new(memory);
        self.active = Some(Active {
            interrupt,
            to_guest,
            from_guest,
            events,
            empty: None,
            buffers: IoVecs::new(&memory),
            memory,
            clients: Clients::new(),
            streams: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            link: None,
            next_id: CLIENT_FIRST,
            next_port: PORT_FIRST,
            guest_cid: self.host.cid,
        });
        self.run(watch);
    }

    fn on_kick(&mut self, _index: u16, watch: &mut dyn Watch) {
        self.run(watch);
    }

    fn on_event(&mut self, token: u64, events: u32, watch: &mut dyn Watch) {
        let Some(active) = self.active.as_mut() else { return };
        match token {
            TURN => self.host.turn.take(),
            LISTENER => active.clients.on_listener(),
            TIMER => {
                // How many ticks passed does not matter.
                let _ticks = self.host.timer.wait();
                if !self.paused {
                    active.on_tick(watch);
                }
            }
            id => active.on_socket(id, events, watch),
        }
        self.run(watch);
    }

    fn deactivate(&mut self, watch: &mut dyn Watch) {
        if let Some(mut active) = self.active.take() {
            active.close_all(watch);
            self.host.unwatch(watch);
            self.host.set_timer(false);
        }
        self.failure.clear();
    }

    fn on_pause(&mut self, paused: bool, watch: &mut dyn Watch) {
        self.paused = paused;
        self.run(watch);
    }

    fn restore(&mut self, _from: &mut StateReader<'_>) -> Result<(), Invalid> {
        self.restored = true;
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        self.failure.reason()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.host.counts;
        let streams = self.active.as_ref().map_or(0, |active| active.streams.len() as u64);
        vec![
            ("from_guest_packets", c.from_guest),
            ("from_guest_bytes", c.from_guest_bytes),
            ("to_guest_packets", c.to_guest),
            ("to_guest_bytes", c.to_guest_bytes),
            ("streams", streams),
            ("streams_opened", c.opened),
            ("resets_sent", c.resets),
            ("malformed", c.malformed),
            ("failures", self.failure.count()),
        ]
    }
}
