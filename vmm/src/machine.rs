//! From a configuration to a running VM in three steps, each consuming the one before.
//!
//! ```text
//!   Assembled ── load() ──► Loaded ── start() ──► Running ── run() ──► ExitReason
//!   VM, memory, vCPUs,      kernel, initramfs,    vCPU threads held,
//!   devices                 boot structures       filters on
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use blixard_vmm_api::config::{ConfigError, NicConfig, VCPUS_MAX};
use blixard_vmm_api::guest::{Identity, LinkRecord};
use blixard_vmm_api::stats::FlightEvent;
use blixard_vmm_api::{ExitReason, VmConfig};
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::arch::x86_64::capabilities;
use crate::arch::x86_64::cpuid::Template;
use crate::boot::{self, BootError};
use crate::bus::Bus;
use crate::control::Control;
use crate::descriptors::{DescriptorError, Descriptors};
use crate::devices::console::Console;
use crate::devices::generation::{self, GenerationError};
use crate::devices::ioapic::IoApic;
use crate::devices::serial::Serial;
use crate::interrupt::Routes;
use crate::kvm::{KvmError, Vm};
use crate::layout;
use crate::mailbox::Mailbox;
use crate::memory::dirty::DirtyMap;
use crate::memory::ram::Ram;
use crate::memory::userfault::Userfault;
use crate::memory::{self, MemoryError};
use crate::pci::{FUNCTIONS_MAX, Function, Root};
use crate::poll::Poll;
use crate::sandbox::{self, SandboxError};
use crate::snapshot::codec::Invalid;
use crate::snapshot::restore::{Restore, RestoreError};
use crate::times::Times;
use crate::vcpu::{self, Begin, VcpuError, Vcpus};
use crate::virtio::balloon::{Balloon, BalloonError};
use crate::virtio::block::{Block, BlockError};
use crate::virtio::device::{Device, GuestMemory};
use crate::virtio::net::{self, Net, NetError};
use crate::virtio::net_tap::Tap;
use crate::virtio::pmem::{Pmem, PmemError};
use crate::virtio::rng::{self, Rng, RngError};
use crate::virtio::transport::{Transport, first_bar};
use crate::virtio::vhost_net::Vhost;
use crate::virtio::vsock::{Vsock, VsockError};
use crate::worker::{AskStop, Guest, Parts, Slot, Worker};

/// Why a VM does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A descriptor is not what the configuration says.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// The kernel gives no VM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel or initramfs is refused.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk is refused.
    #[error("disks.{id}")]
    Block {
        /// Its name.
        id: String,
        /// What is wrong with it.
        #[source]
        source: BlockError,
    },
    /// A nic is refused.
    #[error("nics.{id}")]
    Net {
        /// Its name.
        id: String,
        /// What is wrong with it.
        #[source]
        source: NetError,
    },
    /// A persistent memory is refused.
    #[error("pmem.{id}")]
    Pmem {
        /// Its name.
        id: String,
        /// What is wrong with it.
        #[source]
        source: PmemError,
    },
    /// There is no place for a persistent memory.
    #[error("pmem.{0}: no guest address is left for it")]
    PmemPlace(String),
    /// The balloon cannot be made.
    #[error("balloon")]
    Balloon(#[source] BalloonError),
    /// The vsock device is refused.
    #[error("vsock")]
    Vsock(#[source] VsockError),
    /// The entropy device cannot be made.
    #[error("rng")]
    Rng(#[source] RngError),
    /// More devices than the bus has places.
    #[error("{0} devices, {FUNCTIONS_MAX} are possible")]
    TooManyDevices(usize),
    /// The host has not what is promised of the processor.
    #[error(transparent)]
    Cpu(Invalid),
    /// The VM has no generation id.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// A snapshot is refused.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A vCPU does not start.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A filter cannot be applied.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The console, the control socket or the loop cannot be set up.
    #[error("{what}")]
    Set {
        /// What.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl StartError {
    /// What the process tells its parent.
    pub fn exit_reason(&self) -> ExitReason {
        let detail = crate::chain(self);
        match self {
            Self::Config(_)
            | Self::Descriptor(_)
            | Self::Boot(_)
            | Self::Block { .. }
            | Self::Net { .. }
            | Self::Pmem { .. }
            | Self::PmemPlace(_)
            | Self::Vsock(_)
            | Self::Restore(_)
            | Self::Cpu(_)
            | Self::TooManyDevices(_) => ExitReason::BadConfig { detail },
            Self::Kvm(_)
            | Self::Memory(_)
            | Self::Rng(_)
            | Self::Generation(_)
            | Self::Balloon(_)
            | Self::Vcpu(_)
            | Self::Sandbox(_)
            | Self::Set { .. } => ExitReason::HostProblem { detail },
        }
    }
}

fn set(what: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Set { what, source }
}

/// Where the guest comes from.
enum Source {
    Kernel { kernel: File, initramfs: Option<File> },
    Snapshot(Box<Restore>),
}

/// A machine without a kernel.
pub struct Assembled<'a> {
    config: &'a VmConfig,
    from: Source,
    vm: Vm,
    template: Arc<Template>,
    vcpus: Vec<VcpuFd>,
    ram: Ram,
    userfault: Option<Userfault>,
    /// The pages that were used since a restore, when they are noted.
    used: Option<Arc<DirtyMap>>,
    bus: Arc<Bus>,
    poll: Poll,
    console: Console,
    control: Option<Control>,
    slots: Vec<Slot>,
    guest: Guest,
    ask_stop: Option<AskStop>,
    tell_restored: Option<AskStop>,
}

/// A machine with a kernel in memory.
pub struct Loaded<'a> {
    assembled: Assembled<'a>,
    begin: Begin,
    guest_ready: bool,
    signals: OwnedFd,
}

/// A machine whose vCPUs wait to be let go.
pub struct Running {
    worker: Worker,
    guest: Guest,
}

/// Devices and their names, in the order in which the guest finds them.
type Named = Vec<(String, Box<dyn Device>)>;
/// The same, and how to ask the guest to stop and to tell it that it was restored.
type Devices = (Named, Option<AskStop>, Option<AskStop>);

impl<'a> Assembled<'a> {
    /// Makes VM, memory, vCPUs and devices. The order of the KVM calls is the one that does not wait: see [`crate::kvm`].
    ///
    /// # Errors
    /// The configuration is refused or the host lacks something.
    pub fn new(config: &'a VmConfig, mut given: Descriptors, times: Arc<Times>) -> Result<Self, StartError> {
        let vm = Vm::new(given.take(&config.kvm)?)?;
        let from = Source::new(config, &mut given)?;
        let (ram, userfault) = from.ram(config)?;
        vm.set_memory(ram.memory(), ram.is_tracked())?;
        let pmems = pmems(config, &mut given, &vm, ram.memory())?;
        let mut template = vm.cpuid(config.vcpus)?;
        if let Some(baseline) = &config.cpu {
            template.limit(baseline).map_err(StartError::Cpu)?;
            if let Some(promised) = template.arch_capabilities() {
                capabilities::check(promised, vm.arch_capabilities()?).map_err(StartError::Cpu)?;
            }
        }
        let template = Arc::new(template);
        let vcpus: Result<Vec<VcpuFd>, KvmError> =
            (0..config.vcpus.min(VCPUS_MAX)).map(|index| vm.create_vcpu(index)).collect();
        let vcpus = vcpus?;

        let mailbox = Arc::new(Mailbox::new().map_err(set("mailbox"))?);
        let ioapic = Arc::new(IoApic::new(vm.fd().clone()));
        let serial = Arc::new(Serial::new(ioapic.clone(), mailbox.clone(), times.clone()));
        let mut poll = Poll::new().map_err(set("epoll"))?;
        let console = console(config, &mut given, serial.clone(), &mut poll)?;
        let control = match &config.control {
            Some(name) => Some(Control::new(given.take(name)?, &mut poll).map_err(set("control socket"))?),
            None => None,
        };
        let guest = Guest::default();
        let (mut devices, ask_stop, tell_restored) =
            devices(config, &mut given, &guest, &times, ram.memory())?;
        devices.extend(pmems);
        let devices = from.in_order(devices)?;
        let slots = slots(devices, &vm, ram.memory(), &mailbox)?;
        let functions = slots.iter().map(|slot| slot.transport.clone() as Arc<dyn Function>).collect();
        let pci = Arc::new(Root::new(functions));
        let boot_timer = from.boot_timer(config);
        let bus = Arc::new(Bus { serial, ioapic, pci, times, mailbox, boot_timer });
        Ok(Self {
            config,
            from,
            vm,
            template,
            vcpus,
            ram,
            used: userfault.as_ref().map(Userfault::used),
            userfault,
            bus,
            poll,
            console,
            control,
            slots,
            guest,
            ask_stop,
            tell_restored,
        })
    }

    /// Loads kernel, initramfs and boot structures; or the state of a snapshot.
    ///
    /// With `log_only` filters only log.
    ///
    /// # Errors
    /// They are refused or do not fit.
    pub fn load(mut self, log_only: bool) -> Result<Loaded<'a>, StartError> {
        // Before the first thread, which inherits it.
        let signals = block_signals().map_err(set("signals"))?;
        if let Some(userfault) = self.userfault.take() {
            // From here on somebody answers page faults: with the registers of a vCPU the kernel writes a guest's clock.
            userfault.start(self.bus.mailbox.clone(), log_only).map_err(RestoreError::Userfault)?;
        }
        let (begin, guest_ready) = match &mut self.from {
            Source::Kernel { kernel, initramfs } => {
                generation::renew(self.ram.memory())?;
                let memory = self.ram.memory().clone();
                let (entry, images) = boot::load(&memory, self.config, kernel, initramfs.as_ref())?;
                self.ram.keep(images);
                (Begin::Kernel(self.template.clone(), entry), false)
            }
            Source::Snapshot(restore) => {
                self.template = Arc::new(restore.template(&self.template)?);
                restore.vcpus(&self.vm, &self.vcpus, &self.template)?;
                restore.devices(&self.bus, &mut self.slots)?;
                (Begin::Restored, restore.finish()?)
            }
        };
        Ok(Loaded { assembled: self, begin, guest_ready, signals })
    }
}

impl Source {
    fn new(config: &VmConfig, given: &mut Descriptors) -> Result<Self, StartError> {
        if let Some(restore) = &config.restore {
            let (vcpus, memory) = (config.vcpus, config.memory_mib);
            let opened = Restore::open(restore, given, vcpus, memory, config.memory)?;
            return Ok(Self::Snapshot(Box::new(opened)));
        }
        let kernel = given.take(&config.kernel)?.into();
        let initramfs = config.initramfs.as_ref().map(|name| given.take(name)).transpose()?.map(File::from);
        Ok(Self::Kernel { kernel, initramfs })
    }

    fn ram(&self, config: &VmConfig) -> Result<(Ram, Option<Userfault>), StartError> {
        match self {
            Self::Kernel { .. } => {
                let (memory, file) = memory::create_as(config.memory_mib, config.memory)?;
                Ok((Ram::new(&memory, file, config.memory), None))
            }
            Self::Snapshot(restore) => Ok(restore.memory()?),
        }
    }

    fn in_order<T>(&self, devices: Vec<(String, T)>) -> Result<Vec<(String, T)>, StartError> {
        match self {
            Self::Kernel { .. } => Ok(devices),
            Self::Snapshot(restore) => Ok(restore.in_order(devices)?),
        }
    }

    fn boot_timer(&self, config: &VmConfig) -> bool {
        match self {
            Self::Kernel { .. } => config.boot_timer,
            Self::Snapshot(restore) => restore.boot_timer(),
        }
    }
}

impl Loaded<'_> {
    /// Starts the vCPU threads, held, and puts the filters on. With `log_only` filters only log.
    ///
    /// # Errors
    /// The host refuses threads or filters.
    pub fn start(self, log_only: bool) -> Result<Running, StartError> {
        let Self { assembled, begin, guest_ready, signals } = self;
        let Assembled { config, vm, template, vcpus, ram, bus, poll, console, control, slots, guest, .. } =
            assembled;
        let used = assembled.used;
        let ask_stop = assembled.ask_stop;
        vcpu::catch_kicks()?;
        let vcpus = Vcpus::start(vcpus, &begin, &bus, log_only)?;
        guest.restore(guest_ready);
        let parts = Parts {
            vm: config.vm,
            poll,
            console,
            control,
            signals,
            kvm: vm,
            template,
            vcpus,
            slots,
            ram,
            bus,
            guest: guest.clone(),
            ask_stop,
            used,
            tell_restored: assembled.tell_restored,
            restored: config.restore.as_ref().map(|restore| restore.paused),
        };
        let worker = Worker::new(parts).map_err(set("I/O loop"))?;
        sandbox::enter_io(log_only)?;
        Ok(Running { worker, guest })
    }
}

impl Running {
    /// Runs the guest until it ends.
    pub fn run(&mut self) -> ExitReason {
        self.worker.run()
    }

    /// The last events, for a VM that ended abnormally.
    pub fn flight_events(&self) -> Vec<FlightEvent> {
        self.worker.flight_events()
    }

    /// What the guest's init told.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }
}

fn console(
    config: &VmConfig,
    given: &mut Descriptors,
    serial: Arc<Serial>,
    poll: &mut Poll,
) -> Result<Console, StartError> {
    let mut console = Console::new(serial);
    if let Some(name) = &config.console.log {
        let file = File::from(given.take(name)?);
        console.log_to(file, config.console.log_bytes_max).map_err(set("console.log"))?;
    }
    if let Some(name) = &config.console.listener {
        console.listen(given.take(name)?, poll).map_err(set("console.listener"))?;
    }
    if config.console.stdio {
        console.use_stdio(poll);
    }
    Ok(console)
}

fn devices(
    config: &VmConfig,
    given: &mut Descriptors,
    guest: &Guest,
    times: &Arc<Times>,
    memory: &GuestMemory,
) -> Result<Devices, StartError> {
    let mut devices: Named = vec![];
    for disk in &config.disks {
        let refused = |source| StartError::Block { id: disk.id.clone(), source };
        let serial = disk.serial.as_ref().unwrap_or(&disk.id);
        let backing = given.take(&disk.backing)?;
        let block = Block::new(serial, backing, disk.read_only, &disk.limit).map_err(refused)?;
        devices.push((format!("blk.{}", disk.id), Box::new(block)));
    }
    for nic in &config.nics {
        let refused = |source| StartError::Net { id: nic.id.clone(), source };
        let net = Net::new(net_parts(nic, given)?).map_err(refused)?;
        devices.push((format!("net.{}", nic.id), Box::new(net)));
    }
    let (mut ask_stop, mut tell_restored): (Option<AskStop>, Option<AskStop>) = (None, None);
    if let Some(vsock) = &config.vsock {
        let (guest, times) = (guest.clone(), times.clone());
        let on_link = Box::new(move |record| guest.on_record(record, &times));
        let made = Vsock::new(vsock.cid, given.take(&vsock.listener)?, on_link);
        let (mut device, sender) = made.map_err(StartError::Vsock)?;
        if let Some(name) = &vsock.hook {
            device.set_hook(given.take(name)?).map_err(StartError::Vsock)?;
        }
        devices.push(("vsock".into(), Box::new(device)));
        let sender = Arc::new(sender);
        let stop = sender.clone();
        ask_stop = Some(Box::new(move || stop.send(LinkRecord::Stop)));
        let hostname = config.guest.as_ref().map(|guest| guest.hostname.clone()).unwrap_or_default();
        tell_restored = Some(Box::new(move || {
            let mut seed = [0; 32];
            // Without random bytes the guest still has its generation id.
            let _ = rng::random(&mut seed);
            sender.send(LinkRecord::Restored(Identity { unix_ns: 0, seed, hostname: hostname.clone() }));
        }));
    }
    if config.rng {
        let rng = Rng::with_limit(&config.rng_limit).map_err(StartError::Rng)?;
        devices.push(("rng".into(), Box::new(rng)));
    }
    if let Some(balloon) = &config.balloon {
        let balloon = Balloon::new(balloon, memory).map_err(StartError::Balloon)?;
        devices.push(("balloon".into(), Box::new(balloon)));
    }
    Ok((devices, ask_stop, tell_restored))
}

/// Puts the persistent memories behind memory, in their order.
fn pmems(
    config: &VmConfig,
    given: &mut Descriptors,
    vm: &Vm,
    memory: &GuestMemory,
) -> Result<Named, StartError> {
    let mut end = memory.iter().map(|region| region.start_addr().0 + region.len()).max().unwrap_or(0);
    let mut pmems: Named = vec![];
    for (slot, pmem) in (u32::try_from(memory.num_regions()).unwrap_or(u32::MAX)..).zip(&config.pmem) {
        let refused = |source| StartError::Pmem { id: pmem.id.clone(), source };
        let mut device = Pmem::new(given.take(&pmem.backing)?, pmem.read_only).map_err(refused)?;
        let start = layout::pmem_start(end).ok_or_else(|| StartError::PmemPlace(pmem.id.clone()))?;
        let mapping = device.place(start);
        vm.add_pmem(slot, start, mapping)?;
        end = start.saturating_add(mapping.length);
        pmems.push((format!("pmem.{}", pmem.id), Box::new(device)));
    }
    Ok(pmems)
}

fn net_parts(nic: &NicConfig, given: &mut Descriptors) -> Result<net::Parts, StartError> {
    let refused = |source: NetError| StartError::Net { id: nic.id.clone(), source };
    let mut taps = vec![];
    for name in std::iter::once(&nic.tap).chain(&nic.more_taps) {
        taps.push(Tap::new(given.take(name)?).map_err(|error| refused(error.into()))?);
    }
    let mut vhost = vec![];
    for name in &nic.vhost {
        vhost.push(Vhost::new(given.take(name)?).map_err(|error| refused(error.into()))?);
    }
    let receive_limit = nic.receive_limit.unwrap_or_default();
    let send_limit = nic.send_limit.unwrap_or_default();
    Ok(net::Parts { taps, vhost, mac: nic.mac, mtu: nic.mtu, receive_limit, send_limit })
}

fn slots(
    devices: Vec<(String, Box<dyn Device>)>,
    vm: &Vm,
    memory: &GuestMemory,
    mailbox: &Arc<Mailbox>,
) -> Result<Vec<Slot>, StartError> {
    if devices.len() > FUNCTIONS_MAX {
        return Err(StartError::TooManyDevices(devices.len()));
    }
    let routes = Arc::new(Routes::new(vm.fd().clone()));
    let slot = |(index, (name, device)): (usize, (String, Box<dyn Device>))| {
        let kernel = Some(vm.fd().clone());
        let (bar, mailbox) = (first_bar(index), mailbox.clone());
        let transport = Transport::new(index, device.as_ref(), memory, bar, routes.clone(), mailbox, kernel);
        Slot { name, device, transport: Arc::new(transport), active: false }
    };
    Ok(devices.into_iter().enumerate().map(slot).collect())
}

/// SIGTERM and SIGINT come by descriptor, so that they end the VM in order.
fn block_signals() -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the pointer is to memory of the right size, which the call fills.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: the call above filled it.
    let mut set = unsafe { set.assume_init() };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the set is initialised and the signal exists.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is initialised; the old mask is not wanted. Threads made later inherit the mask.
    if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the set is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
