//! What a vCPU's port or memory access reaches. The set of devices is fixed, so this is a match and no table of traits.

use std::sync::Arc;

use blixard_vmm_api::ExitReason;

use crate::devices::ioapic::IoApic;
use crate::devices::power;
use crate::devices::serial::Serial;
use crate::layout::{
    BOOT_TIMER, ECAM, I8042_COMMAND_PORT, I8042_DATA_PORT, IOAPIC, RESET_PORT, SERIAL_PORT, SERIAL_PORTS,
    SLEEP_STATUS_PORT,
};
use crate::mailbox::{Mailbox, Message};
use crate::pci::{PORTS, PORTS_COUNT, Root};
use crate::times::{Moment, Times};

/// What the guest writes to the boot timer.
const BOOTED: u8 = 123;

/// All devices that answer vCPUs. Shared by all vCPU threads.
pub struct Bus {
    /// Serial port.
    pub serial: Arc<Serial>,
    /// I/O APIC.
    pub ioapic: Arc<IoApic>,
    /// PCI configuration space and BARs.
    pub pci: Arc<Root>,
    /// Moments of the boot.
    pub times: Arc<Times>,
    /// The I/O thread.
    pub mailbox: Arc<Mailbox>,
    /// Whether the boot timer exists.
    pub boot_timer: bool,
}

impl Bus {
    /// Reads from a port. What no device answers reads as ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port.checked_sub(SERIAL_PORT) {
            // A repeated input reads the same register again and again.
            Some(offset) if offset < SERIAL_PORTS => data.fill_with(|| self.serial.read(offset)),
            _ if (PORTS..PORTS + PORTS_COUNT).contains(&port) => {
                data.fill(0xFF);
                self.pci.port_read(port - PORTS, data);
            }
            _ if matches!(port, I8042_DATA_PORT | I8042_COMMAND_PORT | SLEEP_STATUS_PORT) => data.fill(0),
            _ => data.fill(0xFF),
        }
    }

    /// Writes to a port; the reason when that ends the VM.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        match port.checked_sub(SERIAL_PORT) {
            Some(offset) if offset < SERIAL_PORTS => {
                data.iter().for_each(|byte| self.serial.write(offset, *byte));
                None
            }
            _ if (PORTS..PORTS + PORTS_COUNT).contains(&port) && port != RESET_PORT => {
                self.pci.port_write(port - PORTS, data);
                None
            }
            _ => data.first().and_then(|value| power::write(port, *value)),
        }
    }

    /// Reads from memory that is no RAM. What no device answers reads as ones.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some(offset) = ECAM.offset(address, data.len()) {
            self.pci.config_read(offset, data);
        } else if let Some(offset) = IOAPIC.offset(address, data.len()) {
            let value = self.ioapic.read(offset).to_le_bytes();
            data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
        } else {
            self.pci.bar_read(address, data);
        }
    }

    /// Writes to memory that is no RAM.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some(offset) = ECAM.offset(address, data.len()) {
            self.pci.config_write(offset, data);
        } else if let Some(offset) = IOAPIC.offset(address, data.len()) {
            if let [a, b, c, d] = data {
                self.ioapic.write(offset, u32::from_le_bytes([*a, *b, *c, *d]));
            }
        } else if self.boot_timer && address == BOOT_TIMER.start {
            if data.first() == Some(&BOOTED) && self.times.note(Moment::BootTimer) {
                self.mailbox.post(Message::Progress);
            }
        } else {
            self.pci.bar_write(address, data);
        }
    }
}
