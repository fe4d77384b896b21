//! The network between simulated nodes: connections that bytes take some time on. A way can be cut in one direction or both, then
//! what is under way waits for it; it can be slow; connections break. Questions and their answers, each a frame of its own,
//! overtake each other, and are delivered twice now and then.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use blixard_node::raft::peer::{Connect, Stream};
use blixard_node::state::NodeId;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::dice::Dice;
use crate::trace::Trace;

/// When a first packet that was lost is sent again (RFC 6298, section 2.1), and how often one is sent before a node gives up, after
/// 2 s as the real one does.
const SENT_AGAIN: Duration = Duration::from_secs(1);
const TRIES: usize = 2;
/// Bytes under way in one direction of a connection.
const WINDOW: usize = 1 << 20;
/// Where a frame says what it is, and the number of the kind that is a question or an answer.
const KIND_AT: usize = 4;
const CALL: u8 = 2;
const APPEND: u8 = 1;
/// Connections for replication of which is remembered what was sent first, and how much of it.
const SAID_MAX: usize = 64;
const SAID_BYTES_MAX: usize = 64 << 10;
/// Where the content of a frame begins.
const CONTENT_AT: usize = 13;

/// One run of the process of a node.
pub type Run = (NodeId, u64);

/// What a process does with a connection of another node.
pub type Serve = Arc<dyn Fn(End, NodeId) + Send + Sync>;

#[derive(Debug)]
enum Item {
    Bytes(Vec<u8>),
    /// The other end has closed, in good order or not.
    End,
    Reset,
}

/// One direction of a connection.
#[derive(Debug)]
struct Pipe {
    from: Run,
    to: Run,
    items: BTreeMap<(Instant, u64), Item>,
    next: u64,
    /// Nothing arrives before.
    not_before: Instant,
    /// Of the newest bytes, where order is kept.
    newest: Instant,
    bytes: usize,
    /// What was read from an item and not yet taken.
    rest: VecDeque<u8>,
    reset: bool,
    ended: bool,
    /// The other host is gone without a word.
    silent: bool,
    /// Whether each frame goes its own way; known with the first one.
    frames: Option<bool>,
    begun: Vec<u8>,
    /// What is remembered of what was sent.
    said: Option<Said>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// The beginning of what was sent over a connection.
type Said = Arc<Mutex<Vec<u8>>>;
type SharedPipe = Arc<Mutex<Pipe>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pipe {
    fn new(from: Run, to: Run) -> SharedPipe {
        let now = Instant::now();
        Arc::new(Mutex::new(Self {
            from,
            to,
            items: BTreeMap::new(),
            next: 0,
            not_before: now,
            newest: now,
            bytes: 0,
            rest: VecDeque::new(),
            reset: false,
            ended: false,
            silent: false,
            frames: None,
            begun: Vec::new(),
            said: None,
            reader: None,
            writer: None,
        }))
    }

    fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }

    fn put(&mut self, at: Instant, item: Item) {
        if let Item::Bytes(bytes) = &item {
            self.bytes += bytes.len();
        }
        self.items.insert((at, self.next), item);
        self.next += 1;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn put_in_order(&mut self, at: Instant, item: Item) {
        self.newest = self.newest.max(at);
        self.put(self.newest, item);
    }

    fn break_off(&mut self) {
        self.reset = true;
        self.wake();
    }
}

/// How a way in one direction is.
#[derive(Debug, Clone, Copy)]
struct Way {
    cut: bool,
    slow_ms: u64,
}

struct Inner {
    dice: Dice,
    /// Directions that are not as they should be.
    ways: BTreeMap<(NodeId, NodeId), Way>,
    servers: BTreeMap<NodeId, (u64, Serve)>,
    /// Hosts that are without power.
    dark: BTreeSet<NodeId>,
    pipes: Vec<Weak<Mutex<Pipe>>>,
    trace: Trace,
    /// What was sent over connections for replication, from whom to whom; oldest first.
    said: VecDeque<(NodeId, NodeId, Said)>,
    /// Of a thousand questions or answers, how many come twice.
    twice_per_mille: u64,
}

impl Inner {
    fn way(&self, from: NodeId, to: NodeId) -> Way {
        self.ways.get(&(from, to)).copied().unwrap_or(Way { cut: false, slow_ms: 0 })
    }

    fn delay(&mut self, from: NodeId, to: NodeId) -> Duration {
        let slow_ms = self.way(from, to).slow_ms;
        let usual = self.dice.within(0..=2);
        let more = if slow_ms > 0 { self.dice.within(0..=slow_ms) } else { 0 };
        Duration::from_millis(usual + more)
    }

    fn each_pipe(&mut self, mut work: impl FnMut(&mut Pipe, &mut Dice)) {
        self.pipes.retain(|pipe| pipe.strong_count() > 0);
        for pipe in &self.pipes {
            if let Some(pipe) = pipe.upgrade() {
                work(&mut lock(&pipe), &mut self.dice);
            }
        }
    }
}

/// The network. Clones are the same one.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Inner>>);

impl Network {
    /// A network without nodes.
    pub fn new(dice: Dice, trace: Trace, twice_per_mille: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            dice,
            ways: BTreeMap::new(),
            servers: BTreeMap::new(),
            dark: BTreeSet::new(),
            pipes: Vec::new(),
            said: VecDeque::new(),
            trace,
            twice_per_mille,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }

    /// The way of one run of a node to all others.
    pub fn of(&self, run: Run) -> Arc<dyn Connect> {
        Arc::new(Port { network: self.clone(), run })
    }

    /// A node accepts connections from now on.
    pub fn listen(&self, run: Run, serve: Serve) {
        let mut inner = self.inner();
        inner.servers.insert(run.0, (run.1, serve));
        inner.dark.remove(&run.0);
        // Whoever still has a connection to an earlier run hears now that it is over.
        inner.each_pipe(|pipe, _| {
            if pipe.silent && (pipe.from.0 == run.0 || pipe.to.0 == run.0) {
                pipe.break_off();
            }
        });
    }

    /// A run has ended: its system tells the other ends, or, without power, nobody does.
    pub fn end(&self, run: Run, dark: bool) {
        let mut inner = self.inner();
        if inner.servers.get(&run.0).is_some_and(|(number, _)| *number == run.1) {
            inner.servers.remove(&run.0);
        }
        if dark {
            inner.dark.insert(run.0);
        }
        inner.each_pipe(|pipe, dice| {
            if pipe.to == run {
                // It reads nothing any more; who writes to it notices, sooner or later.
                pipe.items.clear();
                if dark {
                    pipe.silent = true
                } else {
                    pipe.break_off()
                }
                pipe.wake();
            } else if pipe.from == run && dark {
                pipe.items.clear();
                pipe.silent = true;
            } else if pipe.from == run {
                let at = Instant::now() + dice.millis(0..=3);
                pipe.put_in_order(at, Item::Reset);
            }
        });
    }

    /// Cuts the way from one node to another, or opens it.
    pub fn cut(&self, from: NodeId, to: NodeId, cut: bool) {
        let mut inner = self.inner();
        let slow_ms = inner.way(from, to).slow_ms;
        inner.ways.insert((from, to), Way { cut, slow_ms });
        if cut {
            return;
        }
        let now = Instant::now();
        inner.each_pipe(|pipe, dice| {
            if (pipe.from.0, pipe.to.0) == (from, to) {
                // Lost packets are sent again after a while, or the connection was given up.
                pipe.not_before = now + dice.millis(0..=400);
                if dice.chance(300) {
                    pipe.reset = true;
                }
                pipe.wake();
            }
        });
    }

    /// Makes a way slow, or as quick as usual.
    pub fn slow(&self, from: NodeId, to: NodeId, slow_ms: u64) {
        let mut inner = self.inner();
        let cut = inner.way(from, to).cut;
        inner.ways.insert((from, to), Way { cut, slow_ms });
    }

    /// Breaks all connections between two nodes.
    pub fn break_connections(&self, a: NodeId, b: NodeId) {
        self.inner().each_pipe(|pipe, _| {
            let ends = (pipe.from.0, pipe.to.0);
            if ends == (a, b) || ends == (b, a) {
                pipe.break_off();
            }
        });
    }

    /// Somebody connects anew and says again what it said over some connection for replication.
    pub fn repeat(&self, dice: &mut Dice) {
        let (serve, end, from) = {
            let mut inner = self.inner();
            let said: Vec<_> = inner.said.iter().cloned().collect();
            let Some((from, to, said)) = dice.pick(&said) else { return };
            let Some((number, serve)) = inner.servers.get(&to).map(|(n, serve)| (*n, Arc::clone(serve)))
            else {
                return;
            };
            let bytes = lock(&said).clone();
            inner.trace.note(format_args!("{from} repeats {} bytes to {to}", bytes.len()));
            // No run of it: the connection is not one that its own process knows.
            let (here, there) = ((from, u64::MAX), (to, number));
            let (way, back) = (Pipe::new(here, there), Pipe::new(there, here));
            inner.pipes.extend([Arc::downgrade(&way), Arc::downgrade(&back)]);
            let (begin, end) = (Instant::now() + dice.millis(0..=200), dice.millis(0..=500));
            {
                let mut way = lock(&way);
                way.put_in_order(begin, Item::Bytes(bytes));
                way.put_in_order(begin + end, Item::End);
            }
            (serve, End::new(self.clone(), way, back), from)
        };
        serve(end, from);
    }

    fn write(&self, pipe: &SharedPipe, bytes: &[u8]) {
        let mut inner = self.inner();
        let mut pipe = lock(pipe);
        let (from, to) = (pipe.from.0, pipe.to.0);
        if pipe.silent {
            return;
        }
        let frames = *pipe.frames.get_or_insert_with(|| bytes.get(KIND_AT) == Some(&CALL));
        if !frames {
            if pipe.said.is_none() && bytes.get(KIND_AT) == Some(&APPEND) {
                let said = Arc::new(Mutex::new(Vec::new()));
                if inner.said.len() == SAID_MAX {
                    inner.said.pop_front();
                }
                inner.said.push_back((from, to, Arc::clone(&said)));
                pipe.said = Some(said);
            }
            // Each write is of whole frames.
            if let Some(mut said) = pipe.said.as_ref().map(|said| lock(said))
                && said.len() + bytes.len() <= SAID_BYTES_MAX
            {
                said.extend_from_slice(bytes);
            }
            let at = Instant::now() + inner.delay(from, to);
            pipe.put_in_order(at, Item::Bytes(bytes.to_vec()));
            return;
        }
        pipe.begun.extend_from_slice(bytes);
        while let Some(frame) = next_frame(&mut pipe.begun) {
            let at = Instant::now() + inner.delay(from, to);
            let twice = inner.twice_per_mille;
            // A command that is proposed twice is applied twice: no connection does that, and no node.
            let proposal =
                frame.get(CONTENT_AT..).is_some_and(|content| content.starts_with(b"{\"propose\""));
            if !proposal && inner.dice.chance(twice) {
                let again = at + inner.dice.millis(0..=500);
                pipe.put(again, Item::Bytes(frame.clone()));
            }
            pipe.put(at, Item::Bytes(frame));
        }
    }
}

fn next_frame(begun: &mut Vec<u8>) -> Option<Vec<u8>> {
    let length = u32::from_le_bytes(begun.get(..4)?.try_into().ok()?);
    let length = usize::try_from(length).ok()? + 4;
    if begun.len() < length {
        return None;
    }
    let rest = begun.split_off(length);
    Some(std::mem::replace(begun, rest))
}

/// Where a run of a node connects from.
struct Port {
    network: Network,
    run: Run,
}

impl Connect for Port {
    fn connect(&self, node: NodeId, _: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        async move {
            let from = self.run.0;
            let reachable = |inner: &Inner| {
                !inner.way(from, node).cut && !inner.way(node, from).cut && !inner.dark.contains(&node)
            };
            for _ in 0..TRIES {
                let (time, arrives) = {
                    let mut inner = self.network.inner();
                    let time = inner.delay(from, node) + inner.delay(node, from);
                    if reachable(&inner) { (time, true) } else { (SENT_AGAIN, false) }
                };
                tokio::time::sleep(time).await;
                if arrives {
                    break;
                }
            }
            let (end, serve, other) = {
                let mut inner = self.network.inner();
                if !reachable(&inner) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                let served = inner.servers.get(&node).map(|(number, serve)| (*number, Arc::clone(serve)));
                let (number, serve) = served.ok_or(io::ErrorKind::ConnectionRefused)?;
                let there = (node, number);
                let (to, back) = (Pipe::new(self.run, there), Pipe::new(there, self.run));
                inner.pipes.extend([Arc::downgrade(&to), Arc::downgrade(&back)]);
                inner.trace.note(format_args!("{from} connects to {node}"));
                let network = &self.network;
                let end = End::new(network.clone(), Arc::clone(&back), Arc::clone(&to));
                (end, serve, End::new(network.clone(), to, back))
            };
            serve(other, from);
            Ok(Box::new(end) as Box<dyn Stream>)
        }
        .boxed()
    }
}

/// One end of a connection.
pub struct End {
    network: Network,
    read: SharedPipe,
    write: SharedPipe,
    timer: Option<Pin<Box<Sleep>>>,
}

impl End {
    fn new(network: Network, read: SharedPipe, write: SharedPipe) -> Self {
        Self { network, read, write, timer: None }
    }
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            let inner = this.network.inner();
            let mut pipe = lock(&this.read);
            if pipe.reset {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if !pipe.rest.is_empty() {
                let (front, _) = pipe.rest.as_slices();
                let count = front.len().min(buffer.remaining());
                buffer.put_slice(front.get(..count).unwrap_or_default());
                pipe.rest.drain(..count);
                return Poll::Ready(Ok(()));
            }
            let (from, to) = (pipe.from.0, pipe.to.0);
            pipe.reader = Some(context.waker().clone());
            if pipe.ended {
                return Poll::Ready(Ok(()));
            }
            let Some(key) = pipe.items.first_key_value().map(|(key, _)| *key) else {
                return Poll::Pending;
            };
            // Opening the way wakes this.
            if inner.way(from, to).cut || pipe.silent {
                return Poll::Pending;
            }
            let at = key.0.max(pipe.not_before);
            if at > Instant::now() {
                let timer = this.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
                if timer.deadline() != at {
                    timer.as_mut().reset(at);
                }
                drop((pipe, inner));
                if timer.as_mut().poll(context).is_ready() {
                    continue;
                }
                return Poll::Pending;
            }
            match pipe.items.remove(&key) {
                Some(Item::Bytes(bytes)) => {
                    let (length, sum) = (bytes.len(), sum(&bytes));
                    inner.trace.note(format_args!("{from} to {to}: {length} bytes, {sum:08x}"));
                    pipe.bytes = pipe.bytes.saturating_sub(length);
                    pipe.rest.extend(bytes);
                    if let Some(writer) = pipe.writer.take() {
                        writer.wake();
                    }
                }
                Some(Item::Reset) => pipe.reset = true,
                Some(Item::End) => pipe.ended = true,
                None => {}
            }
        }
    }
}

/// A short sum of a message (FNV-1a).
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        {
            let mut pipe = lock(&self.write);
            if pipe.reset {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if pipe.bytes > WINDOW {
                pipe.writer = Some(context.waker().clone());
                return Poll::Pending;
            }
        }
        self.network.write(&self.write, bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.close();
        Poll::Ready(Ok(()))
    }
}

impl End {
    fn close(&self) {
        let mut inner = self.network.inner();
        let mut pipe = lock(&self.write);
        let closed = pipe.items.values().any(|item| matches!(item, Item::End));
        if !closed && !pipe.silent {
            let at = Instant::now() + inner.delay(pipe.from.0, pipe.to.0);
            let at = pipe.items.last_key_value().map_or(at, |((last, _), _)| at.max(*last));
            pipe.put_in_order(at, Item::End);
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.close();
        // What is still sent here has nobody who reads it.
        lock(&self.read).break_off();
    }
}
