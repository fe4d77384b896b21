//! Message-signalled interrupts into the kernel: one eventfd and one route per vector in use (`KVM_IRQFD`,
//! `KVM_SET_GSI_ROUTING`).
//!
//! A vector gets its route when it is first raised, not when it is programmed: a driver programs more vectors than it uses,
//! and every change of the table costs a wait for all readers in the kernel. After that an interrupt is one write to an
//! eventfd, also from other threads or from the kernel (vhost).

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::ioapic::Signal;
use crate::layout::IOAPIC_PINS;

/// Most vectors with a route: more than all functions together have.
const ROUTES_MAX: usize = 1024;

/// The kernel's routing table, as we last set it.
pub struct Routes {
    target: Target,
    table: Mutex<Vec<(u64, u32)>>,
}

enum Target {
    Kvm(Arc<VmFd>),
    #[cfg(any(test, feature = "guest-driver"))]
    Test(Mutex<Vec<(u64, u32)>>),
}

/// A vector with a route.
pub struct Vector {
    event: Option<EventFd>,
    index: usize,
    address: u64,
    data: u32,
    /// The kernel raises the interrupt when the event is written.
    connected: bool,
}

impl Routes {
    /// An empty table.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { target: Target::Kvm(vm), table: Mutex::default() }
    }

    /// A table that only remembers what was sent.
    #[cfg(any(test, feature = "guest-driver"))]
    pub fn for_test() -> Self {
        Self { target: Target::Test(Mutex::default()), table: Mutex::default() }
    }

    /// What was sent, in tests.
    #[cfg(any(test, feature = "guest-driver"))]
    pub fn sent(&self) -> Vec<(u64, u32)> {
        match &self.target {
            Target::Kvm(_) => vec![],
            Target::Test(sent) => sent.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Sends an interrupt and makes a route for the next ones. Without a route (no descriptor left) each interrupt goes
    /// by a call of its own.
    pub fn first_send(&self, address: u64, data: u32) -> Option<Vector> {
        let vector = self.add(address, data);
        match &vector {
            Some(vector) => vector.trigger(self),
            None => self.send_directly(address, data),
        }
        vector
    }

    /// Makes a route without sending anything. `None` when there is no descriptor or place left.
    pub fn reserve(&self, address: u64, data: u32) -> Option<Vector> {
        self.add(address, data)
    }

    fn send_directly(&self, address: u64, data: u32) {
        match &self.target {
            Target::Kvm(vm) => vm.signal(address, data),
            #[cfg(any(test, feature = "guest-driver"))]
            Target::Test(sent) => sent.lock().unwrap_or_else(PoisonError::into_inner).push((address, data)),
        }
    }

    fn add(&self, address: u64, data: u32) -> Option<Vector> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let index = table.len();
        if index >= ROUTES_MAX {
            return None;
        }
        let event = match &self.target {
            Target::Kvm(vm) => {
                let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).ok()?;
                table.push((address, data));
                let made = set(vm, &table).and_then(|()| vm.register_irqfd(&event, number(index)).ok());
                if made.is_none() {
                    table.pop();
                    return None;
                }
                Some(event)
            }
            #[cfg(any(test, feature = "guest-driver"))]
            Target::Test(_) => {
                table.push((address, data));
                None
            }
        };
        Some(Vector { event, index, address, data, connected: true })
    }

    fn change(&self, index: usize, address: u64, data: u32) -> Option<()> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        *table.get_mut(index)? = (address, data);
        match &self.target {
            Target::Kvm(vm) => set(vm, &table),
            #[cfg(any(test, feature = "guest-driver"))]
            Target::Test(_) => Some(()),
        }
    }
}

impl Vector {
    /// Sends an interrupt; the guest may have given the vector another address or data since the last one.
    pub fn send(&mut self, routes: &Routes, address: u64, data: u32) {
        if (self.address, self.data) != (address, data) {
            if routes.change(self.index, address, data).is_none() {
                return routes.send_directly(address, data);
            }
            (self.address, self.data) = (address, data);
        }
        self.trigger(routes);
    }

    /// The event, to be written by the kernel.
    pub fn fd(&self) -> Option<RawFd> {
        self.event.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Follows what the guest did to a vector whose event is written by the kernel: while it is not `open` the event only
    /// counts, and the kernel raises one interrupt for what was counted as soon as it is open again.
    pub fn connect(&mut self, routes: &Routes, address: u64, data: u32, open: bool) {
        let (Some(event), Target::Kvm(vm)) = (&self.event, &routes.target) else { return };
        if !open {
            if self.connected && vm.unregister_irqfd(event, number(self.index)).is_ok() {
                self.connected = false;
            }
            return;
        }
        // A refusal leaves the old route: interrupts go to where the guest had them before.
        if (self.address, self.data) != (address, data) && routes.change(self.index, address, data).is_some()
        {
            (self.address, self.data) = (address, data);
        }
        if !self.connected && vm.register_irqfd(event, number(self.index)).is_ok() {
            self.connected = true;
        }
    }

    fn trigger(&self, routes: &Routes) {
        match &self.event {
            // Refused only at the largest count; then an interrupt is on its way anyway.
            Some(event) if self.connected => drop(event.write(1)),
            _ => routes.send_directly(self.address, self.data),
        }
    }
}

/// Number of the interrupt with route `index`: those of the I/O APIC come first.
fn number(index: usize) -> u32 {
    u32::from(IOAPIC_PINS) + u32::try_from(index).unwrap_or(0)
}

fn set(vm: &VmFd, table: &[(u64, u32)]) -> Option<()> {
    let entries: Vec<_> = table
        .iter()
        .enumerate()
        .map(|(index, (address, data))| {
            let part = |shift: u32| u32::try_from(address >> shift & 0xFFFF_FFFF).unwrap_or(0);
            let msi = kvm_irq_routing_msi {
                address_lo: part(0),
                address_hi: part(32),
                data: *data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
            };
            kvm_irq_routing_entry {
                gsi: number(index),
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
                ..Default::default()
            }
        })
        .collect();
    let routing = KvmIrqRouting::from_entries(&entries).ok()?;
    vm.set_gsi_routing(&routing).ok()
}
