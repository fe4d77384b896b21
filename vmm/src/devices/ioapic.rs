//! The I/O APIC (Intel 82093AA), for the one device with an interrupt line: the serial port. Everything else is MSI-X.
//!
//! With the split interrupt controller KVM has the local APICs and we have this. All pins act as edge-triggered, as the
//! DSDT declares the serial interrupt; so no end-of-interrupt has to come back from the kernel.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

use crate::layout::{IOAPIC_PINS, LOCAL_APIC};
use crate::snapshot::codec::{Invalid, Reader, Writer};

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const REDIRECTION: u8 = 0x10;
/// Bits of a redirection entry that software cannot write: delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
const MASKED: u64 = 1 << 16;

/// How a message-signalled interrupt gets to the local APICs.
pub trait Signal: Send + Sync {
    /// Sends `data` to `address`.
    fn signal(&self, address: u64, data: u32);
}

impl Signal for VmFd {
    fn signal(&self, address: u64, data: u32) {
        let [low, high] = [address, address >> 32].map(|part| u32::try_from(part & 0xFFFF_FFFF).unwrap_or(0));
        let message = kvm_msi { address_lo: low, address_hi: high, data, ..Default::default() };
        // It fails when the guest names no local APIC. On hardware the message would be lost as well.
        let _ = self.signal_msi(message);
    }
}

struct State {
    select: u8,
    id: u32,
    entries: [u64; IOAPIC_PINS as usize],
    /// Line levels, one bit per pin.
    lines: u32,
}

/// The controller.
pub struct IoApic {
    state: Mutex<State>,
    signal: Arc<dyn Signal>,
}

impl IoApic {
    /// All pins masked.
    pub fn new(signal: Arc<dyn Signal>) -> Self {
        let state = State { select: 0, id: 0, entries: [MASKED; IOAPIC_PINS as usize], lines: 0 };
        Self { state: Mutex::new(state), signal }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Register at `offset` of the controller's page.
    pub fn read(&self, offset: u64) -> u32 {
        let state = self.state();
        match (offset, state.select) {
            (SELECT, select) => select.into(),
            (WINDOW, ID) => state.id << 24,
            (WINDOW, VERSION) => 0x11 | (u32::from(IOAPIC_PINS) - 1) << 16,
            (WINDOW, ARBITRATION) => 0,
            (WINDOW, select) => {
                let entry = state.entries.get(pin(select)).copied().unwrap_or(0);
                let half = if select & 1 == 0 { entry } else { entry >> 32 };
                u32::try_from(half & 0xFFFF_FFFF).unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// Writes the register at `offset` of the controller's page.
    pub fn write(&self, offset: u64, value: u32) {
        let mut state = self.state();
        match (offset, state.select) {
            (SELECT, _) => {
                let [low, ..] = value.to_le_bytes();
                state.select = low;
            }
            (WINDOW, ID) => state.id = value >> 24 & 0xF,
            (WINDOW, select) if select >= REDIRECTION => {
                let high = state.lines >> pin(select).min(31) & 1 == 1;
                let Some(entry) = state.entries.get_mut(pin(select)) else { return };
                let was_masked = *entry & MASKED != 0;
                let value = u64::from(value);
                *entry = if select & 1 == 0 {
                    *entry & !0xFFFF_FFFF | value & !READ_ONLY
                } else {
                    *entry & 0xFFFF_FFFF | value << 32
                };
                let entry = *entry;
                // An edge that came while masked is not lost: a driver may have missed it while it set up.
                if was_masked && high && entry & MASKED == 0 {
                    self.deliver(entry);
                }
            }
            _ => {}
        }
    }

    /// Writes all registers and line levels for a snapshot.
    pub fn save(&self, to: &mut Writer) {
        let state = self.state();
        to.u8(state.select);
        to.u32(state.id);
        to.u32(state.lines);
        to.u8(IOAPIC_PINS);
        state.entries.iter().for_each(|entry| to.u64(*entry));
    }

    /// Takes those of a snapshot. Nothing is delivered.
    ///
    /// # Errors
    /// There is another number of pins.
    pub fn restore(&self, from: &mut Reader<'_>) -> Result<(), Invalid> {
        let mut state = self.state();
        state.select = from.u8("select register")?;
        state.id = from.u32("id register")? & 0xF;
        state.lines = from.u32("line levels")?;
        let pins = from.u8("pins")?;
        if pins != IOAPIC_PINS {
            return Err(Invalid::Value { what: "pins", value: pins.into() });
        }
        for entry in &mut state.entries {
            *entry = from.u64("redirection entry")? & !READ_ONLY;
        }
        Ok(())
    }

    /// Sets the level of a pin's line; a rise is an interrupt.
    pub fn set_line(&self, pin: u8, high: bool) {
        let mut state = self.state();
        let bit = 1 << u32::from(pin).min(31);
        let was_high = state.lines & bit != 0;
        state.lines = if high { state.lines | bit } else { state.lines & !bit };
        let entry = state.entries.get(usize::from(pin)).copied().unwrap_or(MASKED);
        if high && !was_high && entry & MASKED == 0 {
            self.deliver(entry);
        }
    }

    fn deliver(&self, entry: u64) {
        // Vector and delivery mode have their places in the data, destination and its mode in the address (SDM 3, 11.11).
        let address = LOCAL_APIC.start | (entry >> 56) << 12 | (entry >> 11 & 1) << 2;
        self.signal.signal(address, u32::try_from(entry & 0x7FF).unwrap_or(0));
    }
}

fn pin(select: u8) -> usize {
    usize::from(select.saturating_sub(REDIRECTION) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Sent(Mutex<Vec<(u64, u32)>>);

    impl Signal for Sent {
        fn signal(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    fn program(apic: &IoApic, pin: u32, entry: u64) {
        for half in [1, 0] {
            apic.write(SELECT, 0x10 + 2 * pin + half);
            apic.write(WINDOW, (entry >> (32 * half)) as u32);
        }
    }

    #[test]
    fn an_edge_reaches_the_programmed_processor_once() {
        let sent = Arc::new(Sent::default());
        let apic = IoApic::new(sent.clone());
        program(&apic, 4, 3 << 56 | 0x31);
        apic.set_line(4, true);
        apic.set_line(4, true);
        assert_eq!(*sent.0.lock().unwrap(), [(0xFEE0_3000, 0x31)]);
        apic.set_line(4, false);
        apic.set_line(4, true);
        assert_eq!(sent.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn an_edge_while_masked_comes_when_unmasked() {
        let sent = Arc::new(Sent::default());
        let apic = IoApic::new(sent.clone());
        apic.set_line(4, true);
        assert!(sent.0.lock().unwrap().is_empty());
        program(&apic, 4, 0x40);
        assert_eq!(sent.0.lock().unwrap().len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn no_access_panics(accesses: Vec<(u64, u32, u8)>) {
            let apic = IoApic::new(Arc::new(Sent::default()));
            for (offset, value, pin) in accesses {
                apic.write(offset & 0x10, value);
                apic.read(offset & 0x10);
                apic.write(offset, value);
                apic.set_line(pin, value & 1 == 1);
            }
        }
    }
}
