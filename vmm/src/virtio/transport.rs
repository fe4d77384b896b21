//! Modern virtio over PCI (virtio 1.3 section 4.1): the registers of one device as vCPUs see them.
//!
//! ```text
//!            DRIVER_OK            reset (status = 0)          the I/O thread confirmed
//!   Idle ───────────────► Active ───────────────────► Resetting ───────────────────────► Idle
//!        Activate message          Reset message                  status reads 0
//! ```
//!
//! The device itself lives in the I/O thread and is reached by messages only, so a vCPU never waits for it. Queue registers
//! are frozen once the queue is enabled, and everything is frozen while a reset is under way.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ConfigSpace, Device, DeviceKind, GuestMemory, Interrupt};
use super::queue::{Queue, QueueError};
use crate::flight::{self, What};
use crate::interrupt::Routes;
use crate::mailbox::{Mailbox, Message};
use crate::pci::config::{Bar, ConfigSpace as PciConfig, Identity};
use crate::pci::msix::{ENTRY, MsiX};
use crate::pci::{FUNCTIONS_MAX, Function};

/// Size of the BAR of each device.
pub const BAR_SIZE: u64 = 0x8000;
const COMMON: Part = Part::new(0x0000, 0x40);
const ISR: Part = Part::new(0x1000, 1);
const DEVICE: Part = Part::new(0x2000, 0x1000);
const NOTIFY: Part = Part::new(0x3000, 0x1000);
const TABLE: Part = Part::new(0x4000, 0x1000);
const PENDING: Part = Part::new(0x5000, 0x1000);
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues of a device: so many notification addresses and table entries fit.
const QUEUES_MAX: usize = 64;

const VENDOR: u16 = 0x1AF4;
const DEVICE_BASE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// Types of virtio capabilities (section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// Where the window of the PCI access capability has its fields.
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// `VIRTIO_F_INDIRECT_DESC`.
const F_INDIRECT: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub(super) const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub(super) const F_VERSION_1: u64 = 1 << 32;

pub(super) const STATUS_DRIVER_OK: u8 = 4;
pub(super) const STATUS_FEATURES_OK: u8 = 8;
pub(super) const STATUS_NEEDS_RESET: u8 = 64;
/// What a driver may set: ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED.
pub(super) const STATUS_WRITABLE: u8 = 1 | 2 | STATUS_DRIVER_OK | STATUS_FEATURES_OK | 128;
pub(super) const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// `VIRTIO_MSI_NO_VECTOR`.
pub(super) const NO_VECTOR: u16 = 0xFFFF;

/// A part of the BAR.
#[derive(Clone, Copy)]
struct Part {
    start: u64,
    size: u64,
}

impl Part {
    const fn new(start: u64, size: u64) -> Self {
        Self { start, size }
    }

    /// Offset in this part, when the access lies inside.
    fn offset(self, at: u64, length: usize) -> Option<usize> {
        let offset = usize::try_from(at.checked_sub(self.start)?).ok()?;
        let size = usize::try_from(self.size).ok()?;
        (offset.checked_add(length)? <= size).then_some(offset)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Idle,
    Active,
    Resetting,
}

/// What a driver writes about one queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueRegisters {
    pub size: u16,
    pub vector: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl QueueRegisters {
    fn new(size: u16) -> Self {
        Self { size, vector: NO_VECTOR, enabled: false, descriptors: 0, available: 0, used: 0 }
    }

    pub fn build(&self, index: u16, event_idx: bool, memory: &GuestMemory) -> Result<Queue, QueueError> {
        if self.enabled {
            let Self { size, descriptors, available, used, .. } = *self;
            Queue::new(index, size, descriptors, available, used, event_idx, memory)
        } else {
            Ok(Queue::disabled(index))
        }
    }
}

pub(super) struct State {
    pub pci: PciConfig,
    pub msix_capability: u16,
    window_capability: u16,
    pub msix: MsiX,
    pub phase: Phase,
    pub status: u8,
    pub isr: u8,
    pub generation: u8,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub config_vector: u16,
    pub queue_select: u16,
    pub queues: Vec<QueueRegisters>,
    /// Queues for the I/O thread, between DRIVER_OK and its turn.
    pub ready: Option<Vec<Queue>>,
    /// Notification events by queue, while active.
    kicks: Vec<Option<EventFd>>,
    /// Queues that were notified before their events existed.
    pub early_kicks: u64,
    /// BAR address for which the kernel has the notification events.
    kicks_at: Option<u64>,
    failures: u64,
    /// The device configuration is not that of the snapshot.
    pub config_differs: bool,
}

/// One device on the bus.
pub struct Transport {
    pub(super) index: usize,
    pub(super) kind: DeviceKind,
    pub(super) features: u64,
    pub(super) queue_sizes: Vec<u16>,
    pub(super) config: ConfigSpace,
    pub(super) memory: GuestMemory,
    pub(super) mailbox: Arc<Mailbox>,
    vm: Option<Arc<VmFd>>,
    /// Where the BAR is decoded; `u64::MAX` when it is not. A copy of what the configuration space says.
    bar: AtomicU64,
    state: Mutex<State>,
}

/// What the I/O thread needs to activate a device.
pub struct Ready {
    /// Features that both sides agreed on.
    pub features: u64,
    /// The queues.
    pub queues: Vec<Queue>,
    /// Events of the enabled queues, to be watched before the device is activated.
    pub kicks: Vec<(u16, RawFd)>,
}

impl Transport {
    /// Registers for `device`, which is number `index` of the I/O thread's devices. `vm` is absent only in tests.
    pub fn new(
        index: usize,
        device: &dyn Device,
        memory: &GuestMemory,
        bar: u64,
        routes: Arc<Routes>,
        mailbox: Arc<Mailbox>,
        vm: Option<Arc<VmFd>>,
    ) -> Self {
        let queue_sizes: Vec<u16> = device.queue_sizes().iter().copied().take(QUEUES_MAX).collect();
        let vectors = u16::try_from(queue_sizes.len()).unwrap_or(0) + 1;
        let kind = device.kind();
        let (pci, msix_capability, window_capability) = configuration(kind, vectors, bar);
        let state = State {
            pci,
            msix_capability,
            window_capability,
            msix: MsiX::new(vectors, routes),
            phase: Phase::Idle,
            status: 0,
            isr: 0,
            generation: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: queue_sizes.iter().map(|size| QueueRegisters::new(*size)).collect(),
            ready: None,
            kicks: vec![],
            early_kicks: 0,
            kicks_at: None,
            failures: 0,
            config_differs: false,
        };
        Self {
            index,
            kind,
            features: device.features() | F_INDIRECT | F_EVENT_IDX | F_VERSION_1,
            queue_sizes,
            config: device.config(),
            memory: memory.clone(),
            mailbox,
            vm,
            bar: AtomicU64::new(u64::MAX),
            state: Mutex::new(state),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kind of the device.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// How often the driver was refused because its queues were nonsense.
    pub fn failures(&self) -> u64 {
        self.state().failures
    }

    /// The I/O thread takes what it needs to activate the device; nothing when the driver has changed its mind.
    pub fn take_ready(&self) -> Option<Ready> {
        let mut state = self.state();
        if state.phase != Phase::Active {
            return None;
        }
        let queues = state.ready.take()?;
        let early = std::mem::take(&mut state.early_kicks);
        state.kicks = queues.iter().map(|queue| new_kick(queue, early)).collect();
        self.place_kicks(&mut state);
        let kicks = state.kicks.iter().enumerate();
        let kicks = kicks.filter_map(|(n, kick)| Some((u16::try_from(n).ok()?, kick.as_ref()?.as_raw_fd())));
        Some(Ready { features: state.driver_features, queues, kicks: kicks.collect() })
    }

    /// Descriptors of the notification events, to be watched no more before [`Self::confirm_reset`].
    pub fn kicks(&self) -> Vec<RawFd> {
        self.state().kicks.iter().flatten().map(AsRawFd::as_raw_fd).collect()
    }

    /// The I/O thread has stopped the device.
    pub fn confirm_reset(&self) {
        let mut state = self.state();
        self.remove_kicks(&mut state);
        state.kicks.clear();
        state.ready = None;
        state.phase = Phase::Idle;
        self.reset_registers(&mut state);
    }

    fn reset_registers(&self, state: &mut State) {
        state.status = 0;
        state.isr = 0;
        state.device_feature_select = 0;
        state.driver_feature_select = 0;
        state.driver_features = 0;
        state.config_vector = NO_VECTOR;
        state.queue_select = 0;
        state.early_kicks = 0;
        state.queues = self.queue_sizes.iter().map(|size| QueueRegisters::new(*size)).collect();
    }

    /// Tells the kernel where notifications of the active queues arrive. What it refuses arrives as an exit instead.
    fn place_kicks(&self, state: &mut State) {
        let (Some(vm), Some(bar)) = (&self.vm, state.pci.bar()) else { return };
        for (queue, kick) in (0u64..).zip(&state.kicks) {
            if let Some(kick) = kick {
                let address = IoEventAddress::Mmio(notify_address(bar.address, queue));
                let _ = vm.register_ioevent(kick, &address, NoDatamatch);
            }
        }
        state.kicks_at = Some(bar.address);
    }

    fn remove_kicks(&self, state: &mut State) {
        let (Some(vm), Some(bar)) = (&self.vm, state.kicks_at.take()) else { return };
        for (queue, kick) in (0u64..).zip(&state.kicks) {
            if let Some(kick) = kick {
                let address = IoEventAddress::Mmio(notify_address(bar, queue));
                let _ = vm.unregister_ioevent(kick, &address, NoDatamatch);
            }
        }
    }

    /// The configuration space was written: the BAR may have moved.
    pub(super) fn follow_bar(&self, state: &mut State) {
        let bar = state.pci.bar().map(|bar| bar.address);
        self.bar.store(bar.unwrap_or(u64::MAX), Ordering::Relaxed);
        if state.kicks_at != bar && state.kicks.iter().any(Option::is_some) {
            self.remove_kicks(state);
            self.place_kicks(state);
        }
    }

    fn read_bar(&self, state: &mut State, at: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = COMMON.offset(at, data.len()) {
            let registers = self.common(state);
            for (to, from) in data.iter_mut().zip(registers.iter().skip(offset)) {
                *to = *from;
            }
        } else if ISR.offset(at, data.len()).is_some() {
            data.fill(std::mem::take(&mut state.isr));
        } else if let Some(offset) = DEVICE.offset(at, data.len()) {
            self.config.read(offset, data);
        } else if let Some(offset) = TABLE.offset(at, data.len()) {
            state.msix.read_table(offset, data);
        } else if let Some(offset) = PENDING.offset(at, data.len()) {
            state.msix.read_pending(offset, data);
        }
    }

    fn write_bar(&self, state: &mut State, at: u64, data: &[u8]) {
        if let Some(offset) = COMMON.offset(at, data.len()) {
            self.write_common(state, offset, data);
        } else if let Some(offset) = NOTIFY.offset(at, data.len()) {
            let queue = offset / 4;
            match state.kicks.get(queue) {
                Some(Some(kick)) => drop(kick.write(1)),
                _ if state.ready.is_some() && queue < QUEUES_MAX => state.early_kicks |= 1 << queue,
                _ => {}
            }
        } else if let Some(offset) = TABLE.offset(at, data.len()) {
            state.msix.write_table(offset, data);
        } else if let Some(offset) = DEVICE.offset(at, data.len()) {
            self.config.write(offset, data);
        }
    }

    /// The common configuration structure (section 4.1.4.3).
    fn common(&self, state: &State) -> [u8; 64] {
        let mut bytes = [0; 64];
        let mut put = |offset: usize, value: &[u8]| {
            bytes.iter_mut().skip(offset).zip(value).for_each(|(to, from)| *to = *from);
        };
        let half = |features: u64, select: u32| match select {
            0 | 1 => u32::try_from(features >> (32 * select) & 0xFFFF_FFFF).unwrap_or(0).to_le_bytes(),
            _ => [0; 4],
        };
        put(0x00, &state.device_feature_select.to_le_bytes());
        put(0x04, &half(self.features, state.device_feature_select));
        put(0x08, &state.driver_feature_select.to_le_bytes());
        put(0x0C, &half(state.driver_features, state.driver_feature_select));
        put(0x10, &state.config_vector.to_le_bytes());
        put(0x12, &u16::try_from(state.queues.len()).unwrap_or(0).to_le_bytes());
        put(0x14, &[state.status, state.generation]);
        put(0x16, &state.queue_select.to_le_bytes());
        if let Some(queue) = state.queues.get(usize::from(state.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1A, &queue.vector.to_le_bytes());
            put(0x1C, &u16::from(queue.enabled).to_le_bytes());
            put(0x1E, &state.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        bytes
    }

    fn write_common(&self, state: &mut State, offset: usize, data: &[u8]) {
        if state.phase == Phase::Resetting {
            return;
        }
        let value = data.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let word = u32::try_from(value).unwrap_or(0);
        let short = u16::try_from(value).unwrap_or(0);
        let vectors = state.msix.count();
        let vector = if usize::from(short) < vectors { short } else { NO_VECTOR };
        match (offset, data.len()) {
            (0x00, 4) => state.device_feature_select = word,
            (0x08, 4) => state.driver_feature_select = word,
            (0x0C, 4) => state.set_features(word),
            (0x10, 2) => state.config_vector = vector,
            (0x14, 1) => self.set_status(state, data.first().copied().unwrap_or(0)),
            (0x16, 2) => state.queue_select = short,
            (0x1A, 2) => {
                if let Some(queue) = state.queues.get_mut(usize::from(state.queue_select)) {
                    queue.vector = vector;
                }
            }
            (0x18..0x38, length) => state.set_queue(offset, length, value, &self.queue_sizes),
            _ => {}
        }
    }

    fn set_status(&self, state: &mut State, value: u8) {
        if value == 0 {
            if state.phase == Phase::Active {
                state.phase = Phase::Resetting;
                self.mailbox.post(Message::Reset(self.index));
            } else {
                self.reset_registers(state);
            }
            return;
        }
        let mut new = value & STATUS_WRITABLE & !state.status;
        let agreed = state.driver_features & !self.features == 0 && state.driver_features & F_VERSION_1 != 0;
        if new & STATUS_FEATURES_OK != 0 && !agreed {
            new &= !STATUS_FEATURES_OK;
        }
        let features_ok = (state.status | new) & STATUS_FEATURES_OK != 0;
        if new & STATUS_DRIVER_OK != 0 && !features_ok {
            new &= !STATUS_DRIVER_OK;
        }
        state.status |= new;
        if new & STATUS_DRIVER_OK != 0 && state.phase == Phase::Idle {
            self.activate(state);
        }
    }

    fn activate(&self, state: &mut State) {
        let event_idx = state.driver_features & F_EVENT_IDX != 0;
        let queues: Result<Vec<Queue>, QueueError> =
            (0..).zip(&state.queues).map(|(n, queue)| queue.build(n, event_idx, &self.memory)).collect();
        match queues {
            Ok(queues) => {
                state.phase = Phase::Active;
                state.ready = Some(queues);
                self.mailbox.post(Message::Activate(self.index));
            }
            Err(_) => {
                flight::note(What::device(self.index), "the driver's queues are refused");
                state.failures += 1;
                state.ask_for_reset();
            }
        }
    }
}

impl State {
    fn set_features(&mut self, word: u32) {
        // Frozen once the driver said FEATURES_OK (section 3.1.1).
        if self.status & STATUS_FEATURES_OK == 0 && self.driver_feature_select < 2 {
            let shift = 32 * self.driver_feature_select;
            self.driver_features = self.driver_features & !(0xFFFF_FFFF << shift) | u64::from(word) << shift;
        }
    }

    fn set_queue(&mut self, offset: usize, length: usize, value: u64, sizes: &[u16]) {
        let select = usize::from(self.queue_select);
        let (Some(queue), Some(largest)) = (self.queues.get_mut(select), sizes.get(select)) else { return };
        // Frozen from being enabled until the next reset.
        if queue.enabled || self.status & STATUS_DRIVER_OK != 0 {
            return;
        }
        let field = match offset & !7 {
            0x20 => Some(&mut queue.descriptors),
            0x28 => Some(&mut queue.available),
            0x30 => Some(&mut queue.used),
            _ => None,
        };
        match (offset, length, field) {
            (0x18, 2, _) => {
                let size = u16::try_from(value).unwrap_or(0);
                if size.is_power_of_two() && size <= *largest {
                    queue.size = size;
                }
            }
            (0x1C, 2, _) => queue.enabled = value == 1,
            (_, 8, Some(field)) if offset.is_multiple_of(8) => *field = value,
            (_, 4, Some(field)) if offset.is_multiple_of(8) => *field = *field & !0xFFFF_FFFF | value,
            (_, 4, Some(field)) if offset % 8 == 4 => *field = *field & 0xFFFF_FFFF | value << 32,
            _ => {}
        }
    }

    fn ask_for_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
        self.config_interrupt();
    }

    pub(super) fn config_interrupt(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.interrupt(self.config_vector, ISR_CONFIG);
    }

    pub(super) fn interrupt(&mut self, vector: u16, isr: u8) {
        if self.msix.is_enabled() {
            self.msix.raise(vector);
        } else {
            self.isr |= isr;
        }
    }

    /// Offset and length that the driver set in the PCI access capability, when they are an access.
    fn window(&self) -> Option<(u64, usize)> {
        let field = |at: u16| {
            let mut data = [0; 4];
            self.pci.read(self.window_capability + at, &mut data);
            u32::from_le_bytes(data)
        };
        let (offset, length) = (u64::from(field(WINDOW_OFFSET)), field(WINDOW_LENGTH));
        let plain = matches!(length, 1 | 2 | 4) && offset % u64::from(length) == 0;
        (plain && offset + u64::from(length) <= BAR_SIZE).then_some((offset, usize::try_from(length).ok()?))
    }
}

impl Interrupt for Transport {
    fn used(&self, index: u16) {
        let mut state = self.state();
        if let Some(vector) = state.queues.get(usize::from(index)).map(|queue| queue.vector) {
            state.interrupt(vector, ISR_QUEUE);
        }
    }

    fn config_changed(&self) {
        self.state().config_interrupt();
    }

    fn needs_reset(&self) {
        flight::note(What::device(self.index), "failed");
        self.state().ask_for_reset();
    }

    fn kick_fd(&self, index: u16) -> Option<RawFd> {
        self.state().kicks.get(usize::from(index))?.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn call_fd(&self, index: u16) -> Option<RawFd> {
        let mut state = self.state();
        let vector = state.queues.get(usize::from(index))?.vector;
        state.msix.connect(vector)
    }
}

impl Function for Transport {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.state();
        let data_at = state.window_capability + WINDOW_DATA;
        if (data_at..data_at + 4).contains(&offset)
            && let Some((at, length)) = state.window()
        {
            let mut window = [0; 4];
            self.read_bar(&mut state, at, window.get_mut(..length).unwrap_or_default());
            let skip = usize::from(offset - data_at);
            data.iter_mut().zip(window.iter().skip(skip)).for_each(|(to, from)| *to = *from);
            return;
        }
        state.pci.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.state();
        state.pci.write(offset, data);
        let data_at = state.window_capability + WINDOW_DATA;
        if offset == data_at
            && let Some((at, length)) = state.window()
            && let Some(data) = data.get(..length)
        {
            self.write_bar(&mut state, at, data);
        }
        let control_at = state.msix_capability + 2;
        if (control_at..control_at + 2).contains(&offset) || offset == state.msix_capability {
            let mut control = [0; 2];
            state.pci.read(control_at, &mut control);
            state.msix.set_control(u16::from_le_bytes(control));
        }
        self.follow_bar(&mut state);
    }

    fn decodes(&self, address: u64, length: usize) -> Option<u64> {
        let offset = address.checked_sub(self.bar.load(Ordering::Relaxed))?;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= BAR_SIZE).then_some(offset)
    }

    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        self.read_bar(&mut self.state(), offset, data);
    }

    fn bar_write(&self, offset: u64, data: &[u8]) {
        self.write_bar(&mut self.state(), offset, data);
    }
}

fn new_kick(queue: &Queue, early: u64) -> Option<EventFd> {
    if !queue.is_enabled() {
        return None;
    }
    let was_kicked = early >> queue.index().min(63) & 1 == 1;
    let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).ok()?;
    if was_kicked {
        // The count of a new eventfd is 0, so this cannot be refused.
        let _ = kick.write(1);
    }
    Some(kick)
}

fn notify_address(bar: u64, queue: u64) -> u64 {
    bar + NOTIFY.start + queue * u64::from(NOTIFY_MULTIPLIER)
}

/// The address of the BAR of function `index` before the guest moves it.
pub fn first_bar(index: usize) -> u64 {
    let index = u64::try_from(index.min(FUNCTIONS_MAX)).unwrap_or(0);
    crate::layout::PCI_WINDOW.start + index * BAR_SIZE
}

/// Configuration space with its capabilities, and where MSI-X and the PCI access window are in it.
fn configuration(kind: DeviceKind, vectors: u16, bar: u64) -> (PciConfig, u16, u16) {
    let class = match kind {
        DeviceKind::Net => 0x02_00_00,
        DeviceKind::Block => 0x01_00_00,
        DeviceKind::Rng => 0x10_00_00,
        DeviceKind::Balloon | DeviceKind::Pmem => 0xFF_00_00,
        DeviceKind::Vsock => 0x07_80_00,
    };
    let identity = Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + kind as u16,
        class,
        revision: 1,
        subsystem_vendor: VENDOR,
        subsystem: 0x40,
    };
    let mut pci = PciConfig::new(&identity, Some(Bar { address: bar, size: BAR_SIZE }));
    let place = |part: Part| u32::try_from(part.start).unwrap_or(0).to_le_bytes();
    let size = |bytes: u64| u32::try_from(bytes).unwrap_or(0).to_le_bytes();
    let entries = u64::from(vectors) * u64::try_from(ENTRY).unwrap_or(0);
    debug_assert!(entries <= TABLE.size);
    let msix = [(vectors - 1).to_le_bytes().as_slice(), &place(TABLE), &place(PENDING)].concat();
    let msix_capability = pci.add_capability(CAPABILITY_MSIX, &msix, &[0x00, 0xC0]);
    let notify = u64::from(vectors - 1) * u64::from(NOTIFY_MULTIPLIER);
    for (kind, part, length, extra) in [
        (CFG_COMMON, COMMON, 0x38, [].as_slice()),
        (CFG_ISR, ISR, ISR.size, &[]),
        (CFG_DEVICE, DEVICE, DEVICE.size, &[]),
        (CFG_NOTIFY, NOTIFY, notify, &NOTIFY_MULTIPLIER.to_le_bytes()),
    ] {
        let total = if extra.is_empty() { 16 } else { 20 };
        let head = [total, kind, 0, 0, 0, 0];
        let body = [head.as_slice(), &place(part), &size(length), extra].concat();
        pci.add_capability(CAPABILITY_VENDOR, &body, &[]);
    }
    let mut window = [0; 18];
    let [total, kind, ..] = &mut window;
    (*total, *kind) = (20, CFG_PCI);
    let mut writable = [0xFF; 18];
    // Length, type, id and padding are fixed; the BAR number has only one value that makes sense.
    writable.iter_mut().take(6).for_each(|mask| *mask = 0);
    let window_capability = pci.add_capability(CAPABILITY_VENDOR, &window, &writable);
    (pci, msix_capability.into(), window_capability.into())
}
