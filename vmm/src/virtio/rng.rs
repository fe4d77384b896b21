//! Entropy source (virtio 1.3 section 5.4): random bytes of the host's kernel. The device to copy when writing a new one.

use std::io;
use std::sync::Arc;

use blixard_vmm_api::rate::RateLimit;

use super::chain::{Chain, ChainError};
use super::device::{Activation, ConfigSpace, Device, DeviceKind, GuestMemory, Interrupt, Watch};
use super::failure::Failure;
use super::queue::{Queue, QueueError};
use super::rate::Limiter;
use super::turn::Turn;
use crate::snapshot::codec::{Invalid, Reader as StateReader, Writer as StateWriter};

/// Most bytes given for one request. A driver asks again when it wants more (virtio 1.3 section 5.4.6.2: one byte is
/// enough), so that a request of 4 GiB does not hold up the I/O thread.
pub const BYTES_MAX: usize = 64 << 10;
/// Most requests served before other devices get their turn.
const REQUESTS_PER_TURN: usize = 16;
const QUEUE_SIZES: [u16; 1] = [64];
const TURN: u64 = 0;
const LIMIT: u64 = 1;

/// Why the device stopped until its next reset.
#[derive(Debug, thiserror::Error)]
pub enum RngError {
    /// The rings are broken.
    #[error("request queue")]
    Queue(#[from] QueueError),
    /// A buffer could not be filled.
    #[error("request buffer")]
    Chain(#[from] ChainError),
    /// The kernel has no random bytes.
    #[error("random bytes of the host")]
    Entropy(#[source] io::Error),
    /// The events of the device cannot be made or watched.
    #[error("events of the device")]
    Event(#[source] io::Error),
}

/// The device.
pub struct Rng {
    config: ConfigSpace,
    turn: Turn,
    limiter: Option<Limiter>,
    active: Option<Active>,
    paused: bool,
    requests: u64,
    bytes: u64,
    failure: Failure,
}

struct Active {
    memory: GuestMemory,
    queue: Queue,
    interrupt: Arc<dyn Interrupt>,
    /// The newest request, when the rate limit does not admit it yet.
    held: Option<Chain>,
}

impl Rng {
    /// A device that waits for its driver.
    ///
    /// # Errors
    /// [`RngError::Event`].
    pub fn new() -> Result<Self, RngError> {
        Self::with_limit(&RateLimit::default())
    }

    /// A device that gives no more than this.
    ///
    /// # Errors
    /// [`RngError::Event`].
    pub fn with_limit(limit: &RateLimit) -> Result<Self, RngError> {
        Ok(Self {
            config: ConfigSpace::default(),
            turn: Turn::new().map_err(RngError::Event)?,
            limiter: Limiter::new(limit).map_err(RngError::Event)?,
            active: None,
            paused: false,
            requests: 0,
            bytes: 0,
            failure: Failure::default(),
        })
    }

    fn run(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| !self.paused) else { return };
        let mut served = Served::default();
        match active.serve(&mut served, self.limiter.as_mut()) {
            Ok(true) => self.turn.ask(),
            Ok(false) => {}
            Err(error) => {
                self.failure.note(&error, &*active.interrupt);
                active.queue = Queue::disabled(0);
                active.held = None;
            }
        }
        self.requests += served.requests;
        self.bytes += served.bytes;
    }
}

#[derive(Default)]
struct Served {
    requests: u64,
    bytes: u64,
}

impl Active {
    /// Serves requests; true when there are more.
    fn serve(&mut self, served: &mut Served, mut limiter: Option<&mut Limiter>) -> Result<bool, RngError> {
        for _ in 0..REQUESTS_PER_TURN {
            let chain = match self.held.take() {
                Some(chain) => chain,
                None => match self.queue.pop()? {
                    Some(chain) => chain,
                    None if self.queue.enable_kicks()? => continue,
                    None => return Ok(false),
                },
            };
            if let Some(limiter) = &mut limiter {
                let wanted = u64::from(chain.writable_length()).min(BYTES_MAX as u64);
                if !limiter.admit(wanted, 1).map_err(RngError::Event)? {
                    // The limiter's timer wakes us.
                    self.held = Some(chain);
                    return Ok(false);
                }
            }
            let written = self.fill(&chain)?;
            self.queue.add_used(chain, written)?;
            served.requests += 1;
            served.bytes += u64::from(written);
            if self.queue.publish()? {
                self.interrupt.used(self.queue.index());
            }
        }
        Ok(true)
    }

    fn fill(&self, chain: &Chain) -> Result<u32, RngError> {
        let mut writer = chain.writer(&self.memory);
        let mut left = writer.left().min(BYTES_MAX);
        let mut written = 0;
        let mut bytes = [0; 4096];
        while left > 0 {
            let part = bytes.get_mut(..left.min(4096)).unwrap_or_default();
            random(part).map_err(RngError::Entropy)?;
            writer.write(part)?;
            left -= part.len();
            written += u32::try_from(part.len()).unwrap_or(0);
        }
        Ok(written)
    }
}

/// Fills `data` with random bytes of the kernel.
///
/// # Errors
/// The system's answer.
pub fn random(data: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        let rest = data.get_mut(done..).unwrap_or_default();
        // SAFETY: `rest` is memory of this process that nobody else refers to, writable for its whole length.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

impl Device for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
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
        let queue = queues.into_iter().next().unwrap_or_else(|| Queue::disabled(0));
        let timer = |watch: &mut dyn Watch| self.limiter.as_ref().map_or(Ok(()), |l| l.watch(watch, LIMIT));
        let watched = timer(watch).and_then(|()| self.turn.watch(watch, TURN));
        if let Err(error) = watched {
            self.limiter.iter_mut().for_each(|limiter| limiter.unwatch(watch));
            self.failure.note(&RngError::Event(error), &*interrupt);
            return;
        }
        self.active = Some(Active { memory, queue, interrupt, held: None });
        self.run();
    }

    fn on_kick(&mut self, _index: u16, _watch: &mut dyn Watch) {
        self.run();
    }

    fn on_event(&mut self, token: u64, _events: u32, _watch: &mut dyn Watch) {
        match token {
            LIMIT => self.limiter.iter_mut().for_each(Limiter::take_timer),
            _ => self.turn.take(),
        }
        self.run();
    }

    fn deactivate(&mut self, watch: &mut dyn Watch) {
        if self.active.take().is_some() {
            self.turn.unwatch(watch);
            self.limiter.iter_mut().for_each(|limiter| limiter.unwatch(watch));
        }
        self.failure.clear();
    }

    fn on_pause(&mut self, paused: bool, _watch: &mut dyn Watch) {
        self.paused = paused;
        self.run();
    }

    fn save(&self, to: &mut StateWriter) {
        Limiter::save(self.limiter.as_ref(), to);
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<(), Invalid> {
        Limiter::restore(self.limiter.as_mut(), from)
    }

    fn failure(&self) -> Option<String> {
        self.failure.reason()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let limited = self.limiter.as_ref().map_or(0, Limiter::waits);
        vec![
            ("requests", self.requests),
            ("bytes", self.bytes),
            ("limited", limited),
            ("failures", self.failure.count()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::guest_driver::{Buffer, Machine};
    use blixard_vmm_api::rate::Bucket;

    #[test]
    fn a_limited_device_gives_what_its_bucket_has_and_the_rest_in_time() {
        let limit = RateLimit { bytes: Some(Bucket { size: 64, burst: 0, refill_ms: 50 }), operations: None };
        let mut machine = Machine::start(Rng::with_limit(&limit).unwrap(), 0, true);
        let begin = std::time::Instant::now();
        let at = machine.buffers;
        for i in 0..4 {
            machine.queues[0].post(&[Buffer::Writable(at + 32 * i, 32)]).unwrap();
        }
        machine.kick(0);
        assert!(machine.queues[0].take_used().is_some());
        assert!(machine.queues[0].take_used().is_some());
        assert_eq!(machine.queues[0].take_used(), None, "64 bytes are spent");
        assert_eq!(machine.wait_used(0).1, 32);
        assert_eq!(machine.wait_used(0).1, 32);
        assert!(begin.elapsed() >= std::time::Duration::from_millis(50), "64 bytes more take 50 ms");
        machine.reset();
        assert_eq!(machine.events.watched(), 0);
    }

    #[test]
    fn a_request_is_filled_with_bytes_that_differ() {
        let mut machine = Machine::start(Rng::new().unwrap(), 0, true);
        let at = machine.buffers;
        machine.queues[0].post(&[Buffer::Writable(at, 48), Buffer::Writable(at + 100, 16)]).unwrap();
        machine.kick(0);
        assert_eq!(machine.queues[0].take_used().unwrap().1, 64);
        assert_eq!(machine.interrupts.used_count(0), 1);
        let data = machine.get(at, 116);
        assert_ne!(data[..16], data[16..32]);
        assert_ne!(data[100..], [0; 16]);
        assert_eq!(data[48..100], [0; 52], "bytes between the buffers stay as they were");
    }

    #[test]
    fn a_huge_request_gets_64_kib() {
        let mut machine = Machine::start(Rng::new().unwrap(), 0, false);
        let at = machine.buffers;
        machine.queues[0].post(&[Buffer::Writable(at, 8 << 20)]).unwrap();
        machine.kick(0);
        assert_eq!(machine.queues[0].take_used().unwrap().1, 64 << 10);
        assert_eq!(machine.get(at + (64 << 10), 4096), [0; 4096]);
    }

    #[test]
    fn more_requests_than_one_turn_are_served_by_further_turns() {
        let mut machine = Machine::start(Rng::new().unwrap(), 0, true);
        let at = machine.buffers;
        for i in 0..64 {
            machine.queues[0].post(&[Buffer::Writable(at + i * 8, 8)]).unwrap();
        }
        machine.kick(0);
        let mut seen = 0;
        machine.until(|_, queues| {
            seen += usize::from(queues[0].take_used().is_some());
            seen == 64
        });
    }

    #[test]
    fn a_broken_ring_stops_the_device_until_its_reset() {
        let mut machine = Machine::start(Rng::new().unwrap(), 0, false);
        machine.queues[0].available_index(65);
        machine.device.on_kick(0, &mut machine.events);
        machine.device.on_kick(0, &mut machine.events);
        assert_eq!(machine.interrupts.reset_count(), 1);
        assert!(machine.device.failure().unwrap().contains("available index jumped from 0 to 65"));
        machine.reset();
        assert_eq!(machine.events.watched(), 0);
        machine.activate();
        assert_eq!(machine.device.failure(), None);
        machine.queues[0].post(&[Buffer::Writable(machine.buffers, 8)]).unwrap();
        machine.kick(0);
        assert_eq!(machine.queues[0].take_used().unwrap().1, 8);
    }

    #[test]
    fn a_paused_device_serves_what_came_meanwhile_when_it_goes_on() {
        let mut machine = Machine::start(Rng::new().unwrap(), 0, true);
        machine.device.on_pause(true, &mut machine.events);
        machine.queues[0].post(&[Buffer::Writable(machine.buffers, 8)]).unwrap();
        machine.kick(0);
        assert_eq!(machine.queues[0].take_used(), None);
        machine.device.on_pause(false, &mut machine.events);
        assert_eq!(machine.queues[0].take_used().unwrap().1, 8);
    }
}
