//! Memory balloon (virtio 1.3 section 5.5): memory that the guest does without is given back to the host.
//!
//! ```text
//!  inflate    page numbers that the guest gives up     ─► released
//!  deflate    page numbers that it uses again          ─► nothing to do: pages come back when they are touched
//!  statistics one buffer, kept until the next interval ─► counters
//!  hinting    one round: id, free ranges, end          ─► released while the guest keeps its hands off them
//!  reporting  free ranges, all the time                ─► released, then the guest may use them again
//! ```
//!
//! Queues that were not agreed on have no number: those behind them move up, as Linux and QEMU have it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use blixard_vmm_api::config::BalloonConfig;
use vm_memory::GuestMemoryError;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::balloon_release::Release;
use super::chain::{Chain, ChainError};
use super::device::{
    Activation, ConfigSpace, Device, DeviceKind, DeviceRequest, GuestMemory, Interrupt, Watch,
};
use super::failure::Failure;
use super::queue::{Queue, QueueError};
use super::socket;
use super::turn::Turn;
use crate::layout::MIB;
use crate::snapshot::codec::{Invalid, Reader as StateReader, Writer as StateWriter};

/// Most page numbers of one chain that are looked at. Linux sends 256; more are legal and stay where they are.
const NUMBERS_MAX: usize = 4096;
/// Most bytes of one chain of free ranges that are released. Linux sends 128 MiB; the rest stays where it is.
const FREE_BYTES_MAX: u64 = 256 << 20;
/// Chains served before other devices get their turn.
const CHAINS_PER_TURN: usize = 16;
/// Bytes released before other devices get their turn.
const BYTES_PER_TURN: u64 = 256 << 20;
/// Page numbers are of pages of this size, whatever the guest's own pages are.
const PAGE: u64 = 4096;
const QUEUE_SIZE: u16 = 128;
const TURN: u64 = 0;
const TIMER: u64 = 1;

/// Offsets in the configuration space (section 5.5.4).
mod field {
    pub const TARGET: usize = 0;
    pub const ACTUAL: usize = 4;
    pub const HINT: usize = 8;
    pub const END: usize = 16;
}

/// Bits of section 5.5.3.
mod feature {
    pub const STATISTICS: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const HINTING: u64 = 1 << 3;
    pub const REPORTING: u64 = 1 << 5;
}

/// Commands of free page hinting: the driver stops, the driver takes its pages back. Larger numbers begin a round.
const HINT_STOP: u32 = 0;
const HINT_DONE: u32 = 1;

/// Names of the statistics by tag (section 5.5.6.4).
const STATISTICS: [&str; 16] = [
    "guest_swapped_in_bytes",
    "guest_swapped_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_disk_cache_bytes",
    "guest_huge_page_allocations",
    "guest_huge_page_failures",
    "guest_oom_kills",
    "guest_allocation_stalls",
    "guest_background_scans",
    "guest_direct_scans",
    "guest_background_reclaims",
    "guest_direct_reclaims",
];
/// Most statistics of one buffer that are looked at.
const STATISTICS_MAX: usize = 64;

/// Why a balloon cannot be.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The events of the device cannot be made.
    #[error("events of the balloon")]
    Event(#[source] io::Error),
}

/// Why the balloon stopped until its next reset.
#[derive(Debug, thiserror::Error)]
enum BalloonFailure {
    #[error("queue")]
    Queue(#[from] QueueError),
    #[error("buffer")]
    Chain(#[from] ChainError),
    #[error("page {0:#x} is not inside guest memory")]
    Outside(u32, #[source] GuestMemoryError),
    #[error("free range")]
    Range(#[source] GuestMemoryError),
    #[error("events of the device")]
    Event(#[source] io::Error),
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// All roles with the feature that each needs.
const ROLES: [(Role, u64); 5] = [
    (Role::Inflate, 0),
    (Role::Deflate, 0),
    (Role::Statistics, feature::STATISTICS),
    (Role::Hinting, feature::HINTING),
    (Role::Reporting, feature::REPORTING),
];

/// The roles of the queues, in their order, when these features are agreed on.
fn roles(features: u64) -> impl Iterator<Item = Role> {
    ROLES.into_iter().filter(move |(_, needs)| features & needs == *needs).map(|(role, _)| role)
}

/// The device.
pub struct Balloon {
    features: u64,
    queue_sizes: Vec<u16>,
    /// Most MiB of the target.
    memory_mib: u32,
    config: ConfigSpace,
    interval: Duration,
    timer: TimerFd,
    turn: Turn,
    work: Work,
    active: Option<Active>,
    paused: bool,
    failure: Failure,
}

/// What serving needs besides the driver's side.
struct Work {
    config: ConfigSpace,
    release: Release,
    /// Number of the newest round of hinting.
    round: u32,
    /// The driver told the number of the newest round: its ranges follow.
    round_begun: bool,
    /// Values of the newest statistics by tag.
    statistics: [Option<u64>; STATISTICS.len()],
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    inflated: u64,
    deflated: u64,
    reported: u64,
    hinted: u64,
    rounds: u64,
    updates: u64,
    ignored: u64,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    queues: Vec<(Role, Queue)>,
    /// The driver's buffer for statistics, until we want new ones.
    statistics: Option<Chain>,
}

impl Balloon {
    /// A balloon of a VM with this memory.
    ///
    /// # Errors
    /// [`BalloonError::Event`].
    pub fn new(config: &BalloonConfig, memory: &GuestMemory) -> Result<Self, BalloonError> {
        let mut features = 0;
        for (wanted, feature) in [
            (config.statistics_s > 0, feature::STATISTICS),
            (config.deflate_on_oom, feature::DEFLATE_ON_OOM),
            (config.free_page_hinting, feature::HINTING),
            (config.free_page_reporting, feature::REPORTING),
        ] {
            features |= if wanted { feature } else { 0 };
        }
        let (low, high) = crate::memory::sizes(memory);
        let space = ConfigSpace::with_writable(vec![0; field::END], field::ACTUAL..field::HINT);
        let timer = TimerFd::new().map_err(|e| BalloonError::Event(e.into()))?;
        // An event may be left over from a timer that was stopped meanwhile: reading it must not wait.
        socket::set_nonblocking(&timer).map_err(BalloonError::Event)?;
        let balloon = Self {
            features,
            queue_sizes: roles(features).map(|_| QUEUE_SIZE).collect(),
            memory_mib: u32::try_from((low + high) / MIB).unwrap_or(u32::MAX),
            config: space.clone(),
            interval: Duration::from_secs(config.statistics_s.into()),
            timer,
            turn: Turn::new().map_err(BalloonError::Event)?,
            work: Work {
                config: space,
                release: Release::new(memory),
                round: HINT_DONE,
                round_begun: false,
                statistics: [None; STATISTICS.len()],
                counts: Counts::default(),
            },
            active: None,
            paused: false,
            failure: Failure::default(),
        };
        balloon.set_target(config.target_mib);
        Ok(balloon)
    }

    fn set_target(&self, mib: u32) {
        // 2^20 MiB at most: so many pages fit.
        self.config.set_field(field::TARGET, mib.min(self.memory_mib).saturating_mul(256));
    }

    fn config_changed(&self) {
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    fn is_hinting(&self) -> bool {
        self.config.field(field::HINT) > HINT_DONE
    }

    fn run(&mut self) {
        let Some(active) = self.active.as_mut().filter(|_| !self.paused) else { return };
        match active.serve(&mut self.work) {
            Ok(true) => self.turn.ask(),
            Ok(false) => {}
            Err(error) => {
                self.failure.note(&error, &*active.interrupt);
                active.queues.clear();
                active.statistics = None;
            }
        }
    }

    /// Lets the timer run while somebody is there to answer, so that a paused VM costs nothing.
    fn set_timer(&mut self) -> io::Result<()> {
        let wanted = !self.paused && self.active.is_some() && !self.interval.is_zero();
        let result = match wanted {
            true => self.timer.reset(self.interval, Some(self.interval)),
            false => self.timer.clear(),
        };
        result.map_err(io::Error::from)
    }

    fn watch(&self, watch: &mut dyn Watch) -> io::Result<()> {
        watch.add(self.timer.as_raw_fd(), EventSet::IN.bits(), TIMER)?;
        self.turn.watch(watch, TURN).inspect_err(|_| watch.remove(self.timer.as_raw_fd()))
    }
}

impl Active {
    /// Serves all queues; true when there is more than fits in one turn.
    fn serve(&mut self, work: &mut Work) -> Result<bool, BalloonFailure> {
        let before = work.release.released();
        for place in 0..self.queues.len() {
            for served in 0.. {
                let Some((role, queue)) = self.queues.get_mut(place) else { break };
                if served == CHAINS_PER_TURN || work.release.released() - before >= BYTES_PER_TURN {
                    return Ok(true);
                }
                let chain = match queue.pop()? {
                    Some(chain) => chain,
                    None if queue.enable_kicks()? => continue,
                    None => break,
                };
                match *role {
                    Role::Inflate => work.inflate(&chain, &self.memory)?,
                    Role::Deflate => work.counts.deflated += u64::from(chain.readable_length()) / 4,
                    Role::Hinting => work.hint(&chain, &self.memory, &*self.interrupt)?,
                    Role::Reporting => work.counts.reported += work.free(&chain, &self.memory)?,
                    Role::Statistics => {
                        work.take_statistics(&chain, &self.memory)?;
                        // One buffer stays here. A driver that offers a second one gets the first one back.
                        if let Some(older) = self.statistics.replace(chain) {
                            give_back(queue, older, &*self.interrupt)?;
                        }
                        continue;
                    }
                }
                give_back(queue, chain, &*self.interrupt)?;
            }
        }
        Ok(false)
    }

    /// Gives the statistics buffer back: that asks the driver for new ones.
    fn ask_for_statistics(&mut self) -> Result<(), BalloonFailure> {
        let queue = self.queues.iter_mut().find(|(role, _)| *role == Role::Statistics);
        if let (Some((_, queue)), Some(chain)) = (queue, self.statistics.take()) {
            give_back(queue, chain, &*self.interrupt)?;
        }
        Ok(())
    }
}

fn give_back(queue: &mut Queue, chain: Chain, interrupt: &dyn Interrupt) -> Result<(), QueueError> {
    queue.add_used(chain, 0)?;
    if queue.publish()? {
        interrupt.used(queue.index());
    }
    Ok(())
}

impl Work {
    fn inflate(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), BalloonFailure> {
        let mut reader = chain.reader(memory);
        let told = reader.left() / 4;
        let mut numbers = Vec::with_capacity(told.min(NUMBERS_MAX));
        for _ in 0..told.min(NUMBERS_MAX) {
            numbers.push(u32::from_le_bytes(reader.read_array()?));
        }
        self.counts.inflated += told as u64;
        self.counts.ignored += (told - numbers.len()) as u64;
        numbers.sort_unstable();
        numbers.dedup();
        // Neighbours are released by one call.
        for run in numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let Some(first) = run.first() else { continue };
            self.release
                .range(memory, u64::from(*first) * PAGE, run.len() as u64 * PAGE)
                .map_err(|error| BalloonFailure::Outside(*first, error))?;
        }
        Ok(())
    }

    /// Releases the writable buffers of a chain; how many bytes they have.
    fn free(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<u64, BalloonFailure> {
        let mut writer = chain.writer(memory);
        let mut left = FREE_BYTES_MAX;
        while let Some(piece) = writer.next_segment(usize::try_from(left).unwrap_or(usize::MAX)) {
            left = left.saturating_sub(piece.length.into());
            self.release
                .range(memory, piece.address.0, piece.length.into())
                .map_err(BalloonFailure::Range)?;
        }
        self.counts.ignored += writer.left() as u64 / PAGE;
        Ok(chain.writable_length().into())
    }

    fn hint(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
    ) -> Result<(), BalloonFailure> {
        let wanted = self.config.field(field::HINT);
        if chain.readable_length() >= 4 {
            let told = u32::from_le_bytes(chain.reader(memory).read_array()?);
            let ends = self.round_begun && told == HINT_STOP;
            self.round_begun = wanted > HINT_DONE && told == wanted;
            if ends && wanted > HINT_DONE {
                // Everything it told is released: it may use its pages again.
                self.config.set_field(field::HINT, HINT_DONE);
                self.counts.rounds += 1;
                interrupt.config_changed();
            }
        } else if self.round_begun && wanted > HINT_DONE {
            // In any other moment the pages may be in use again.
            self.counts.hinted += self.free(chain, memory)?;
        }
        Ok(())
    }

    /// Pairs of a tag (2 bytes) and a value (8 bytes).
    fn take_statistics(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), BalloonFailure> {
        let mut reader = chain.reader(memory);
        for _ in 0..(reader.left() / 10).min(STATISTICS_MAX) {
            let tag = u16::from_le_bytes(reader.read_array()?);
            let value = u64::from_le_bytes(reader.read_array()?);
            if let Some(place) = self.statistics.get_mut(usize::from(tag)) {
                *place = Some(value);
            }
        }
        self.counts.updates += 1;
        Ok(())
    }
}

impl Device for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn activate(&mut self, activation: Activation, watch: &mut dyn Watch) {
        let Activation { memory, features, queues, interrupt } = activation;
        if let Err(error) = self.watch(watch) {
            self.failure.note(&BalloonFailure::Event(error), &*interrupt);
            return;
        }
        let queues = roles(features & self.features).zip(queues).collect();
        self.active = Some(Active { memory, interrupt, queues, statistics: None });
        if let (Err(error), Some(active)) = (self.set_timer(), &self.active) {
            self.failure.note(&BalloonFailure::Event(error), &*active.interrupt);
        }
        self.run();
    }

    fn on_kick(&mut self, _index: u16, _watch: &mut dyn Watch) {
        self.run();
    }

    fn on_event(&mut self, token: u64, _events: u32, _watch: &mut dyn Watch) {
        if token == TURN {
            self.turn.take();
            return self.run();
        }
        // It fails when the timer was stopped meanwhile.
        let ticked = self.timer.wait().is_ok();
        if let Some(active) = self.active.as_mut().filter(|_| ticked && !self.paused)
            && let Err(error) = active.ask_for_statistics()
        {
            self.failure.note(&error, &*active.interrupt);
            active.queues.clear();
        }
    }

    fn deactivate(&mut self, watch: &mut dyn Watch) {
        if self.active.take().is_some() {
            self.turn.unwatch(watch);
            watch.remove(self.timer.as_raw_fd());
        }
        // A timer that goes on is watched by nobody.
        let _still_set = self.set_timer();
        self.config.set_field(field::ACTUAL, 0);
        self.config.set_field(field::HINT, HINT_STOP);
        self.work.round_begun = false;
        self.work.statistics = [None; STATISTICS.len()];
        self.failure.clear();
    }

    fn on_pause(&mut self, paused: bool, _watch: &mut dyn Watch) {
        self.paused = paused;
        // At worst there are no new statistics.
        let _not_set = self.set_timer();
        self.run();
    }

    fn on_request(&mut self, request: DeviceRequest, _watch: &mut dyn Watch) -> Result<(), String> {
        match request {
            DeviceRequest::Inflate(mib) if mib >= self.memory_mib => {
                return Err(format!("{mib} MiB asked for, the VM has {} MiB", self.memory_mib));
            }
            DeviceRequest::Inflate(mib) => self.set_target(mib),
            DeviceRequest::StartHinting | DeviceRequest::StopHinting
                if self.features & feature::HINTING == 0 =>
            {
                return Err("free page hinting is not configured".into());
            }
            DeviceRequest::StartHinting if self.is_hinting() => return Err("it is under way".into()),
            DeviceRequest::StartHinting => {
                // The two lowest numbers are commands.
                self.work.round = self.work.round.checked_add(1).unwrap_or(HINT_DONE + 1);
                self.work.round_begun = false;
                self.config.set_field(field::HINT, self.work.round);
            }
            DeviceRequest::StopHinting => {
                self.work.round_begun = false;
                self.config.set_field(field::HINT, HINT_DONE);
            }
            _ => return Err("a balloon does nothing of the kind".into()),
        }
        self.config_changed();
        Ok(())
    }

    fn save(&self, to: &mut StateWriter) {
        to.u32(self.config.field(field::TARGET));
        to.u32(self.config.field(field::ACTUAL));
        to.u32(self.work.round);
        to.bool(self.is_hinting());
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<(), Invalid> {
        let target = from.u32("balloon target")?;
        self.set_target(target / 256);
        self.config.set_field(field::ACTUAL, from.u32("balloon size")?);
        self.work.round = from.u32("round of hinting")?.max(HINT_DONE);
        // A round that was under way ends: what it told was released in the VM of then.
        let was_hinting = from.bool("hinting")?;
        self.config.set_field(field::HINT, if was_hinting { HINT_DONE } else { HINT_STOP });
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        self.failure.reason()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let (c, release) = (&self.work.counts, &self.work.release);
        let mut counters = vec![
            ("target_bytes", u64::from(self.config.field(field::TARGET)) * PAGE),
            ("actual_bytes", u64::from(self.config.field(field::ACTUAL)) * PAGE),
            ("inflated_pages", c.inflated),
            ("deflated_pages", c.deflated),
            ("reported_bytes", c.reported),
            ("hinted_bytes", c.hinted),
            ("hinting", u64::from(self.is_hinting())),
            ("hinting_rounds", c.rounds),
            ("released_bytes", release.released()),
            ("release_failures", release.failures()),
            ("ignored_pages", c.ignored),
            ("statistics_updates", c.updates),
            ("failures", self.failure.count()),
        ];
        let statistics = STATISTICS.into_iter().zip(self.work.statistics);
        counters.extend(statistics.filter_map(|(name, value)| Some((name, value?))));
        counters
    }
}
