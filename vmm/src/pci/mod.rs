//! The PCI root: one bus, the host bridge and one function per device, all present from the beginning.
//!
//! Configuration space is reached by ECAM, and by the ports 0xCF8 and 0xCFC: small guests know no other way, and Linux
//! believes in ECAM early only when the ports are there too. Functions have no interrupt line, only MSI-X.

pub mod config;
pub mod msix;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::snapshot::codec::{Invalid, Reader, Writer};

/// Most functions besides the host bridge: device numbers 1 to 31.
pub const FUNCTIONS_MAX: usize = 31;
/// Address and data ports of configuration space.
pub const PORTS: u16 = 0xCF8;
/// Their number.
pub const PORTS_COUNT: u16 = 8;
/// Bits 24 to 30 and 0 to 1 of the address register are reserved and read as zero.
const ADDRESS_BITS: u32 = 0x80FF_FFFC;
/// Configuration space of one function by ECAM.
const FUNCTION_SPACE: u64 = 4096;
/// Functions per device number.
const FUNCTIONS_PER_DEVICE: u64 = 8;

/// A function on the bus, as vCPUs see it.
pub trait Function: Send + Sync {
    /// Reads configuration space at `offset`; `data` has 1, 2 or 4 bytes and does not cross 4 bytes.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// Offset of `address` in the function's memory, when it decodes that address now.
    fn decodes(&self, address: u64, length: usize) -> Option<u64>;
    /// Reads the function's memory at `offset`.
    fn bar_read(&self, offset: u64, data: &mut [u8]);
    /// Writes the function's memory at `offset`.
    fn bar_write(&self, offset: u64, data: &[u8]);
}

/// The host bridge has an identity and nothing else.
struct HostBridge(config::ConfigSpace);

/// The bus.
pub struct Root {
    bridge: HostBridge,
    functions: Vec<Arc<dyn Function>>,
    /// The address register at port 0xCF8. Guests lock their accesses to it and its data.
    address: AtomicU32,
}

impl Root {
    /// A bus with these functions as devices 1, 2 and so on.
    pub fn new(functions: Vec<Arc<dyn Function>>) -> Self {
        // Vendor and device as QEMU's generic host bridge ("Red Hat", 1b36:0008), class host bridge.
        let identity = config::Identity {
            vendor: 0x1B36,
            device: 0x0008,
            class: 0x06_00_00,
            revision: 0,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        let bridge = HostBridge(config::ConfigSpace::new(&identity, None));
        Self { bridge, functions, address: AtomicU32::new(0) }
    }

    /// The function that an ECAM offset belongs to, and the offset in its space.
    fn split(offset: u64) -> (u64, u64, u16) {
        let number = offset / FUNCTION_SPACE;
        let inside = u16::try_from(offset % FUNCTION_SPACE).unwrap_or(0);
        (number / FUNCTIONS_PER_DEVICE, number % FUNCTIONS_PER_DEVICE, inside)
    }

    fn device(&self, device: u64) -> Option<&Arc<dyn Function>> {
        let index = usize::try_from(device.checked_sub(1)?).ok()?;
        self.functions.get(index)
    }

    /// Reads configuration space by ECAM. What is not there reads as ones, which `data` has to be.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) {
        match Self::split(offset) {
            (_, _, inside) if !is_plain(inside, data.len()) => {}
            (0, 0, inside) => self.bridge.0.read(inside, data),
            (device, 0, inside) => {
                if let Some(function) = self.device(device) {
                    function.config_read(inside, data);
                }
            }
            _ => {}
        }
    }

    /// Writes configuration space by ECAM.
    pub fn config_write(&self, offset: u64, data: &[u8]) {
        if let (device, 0, inside) = Self::split(offset)
            && is_plain(inside, data.len())
            && let Some(function) = self.device(device)
        {
            function.config_write(inside, data);
        }
    }

    /// Reads one of the eight ports from [`PORTS`] on; `offset` counts from there. `data` is all ones.
    pub fn port_read(&self, offset: u16, data: &mut [u8]) {
        if let Some(at) = self.selected(offset) {
            self.config_read(at, data);
        } else if let (0, [a, b, c, d]) = (offset, data) {
            [*a, *b, *c, *d] = self.address.load(Ordering::Relaxed).to_le_bytes();
        }
    }

    /// Writes one of these ports.
    pub fn port_write(&self, offset: u16, data: &[u8]) {
        if let Some(at) = self.selected(offset) {
            self.config_write(at, data);
        } else if let (0, [a, b, c, d]) = (offset, data) {
            let address = u32::from_le_bytes([*a, *b, *c, *d]) & ADDRESS_BITS;
            self.address.store(address, Ordering::Relaxed);
        }
    }

    /// Writes the state of the bus itself for a snapshot; functions save theirs.
    pub fn save(&self, to: &mut Writer) {
        to.u32(self.address.load(Ordering::Relaxed));
    }

    /// Takes the state of a snapshot.
    ///
    /// # Errors
    /// It is cut off.
    pub fn restore(&self, from: &mut Reader<'_>) -> Result<(), Invalid> {
        self.address.store(from.u32("address register")? & ADDRESS_BITS, Ordering::Relaxed);
        Ok(())
    }

    /// The ECAM offset that a data port stands for now: bus, device, function and register of the address register.
    fn selected(&self, offset: u16) -> Option<u64> {
        let byte = offset.checked_sub(4)?;
        let address = u64::from(self.address.load(Ordering::Relaxed));
        let function = address >> 8 & 0xFFFF;
        (address >> 31 == 1).then_some(function * FUNCTION_SPACE + (address & 0xFC) + u64::from(byte))
    }

    /// Reads memory of whichever function decodes `address`.
    pub fn bar_read(&self, address: u64, data: &mut [u8]) {
        if let Some((function, offset)) = self.decode(address, data.len()) {
            function.bar_read(offset, data);
        }
    }

    /// Writes memory of whichever function decodes `address`.
    pub fn bar_write(&self, address: u64, data: &[u8]) {
        if let Some((function, offset)) = self.decode(address, data.len()) {
            function.bar_write(offset, data);
        }
    }

    fn decode(&self, address: u64, length: usize) -> Option<(&Arc<dyn Function>, u64)> {
        self.functions.iter().find_map(|f| f.decodes(address, length).map(|offset| (f, offset)))
    }
}

/// Accesses of 1, 2 or 4 bytes that do not cross 4 bytes; others do not exist on the bus.
fn is_plain(offset: u16, length: usize) -> bool {
    matches!(length, 1 | 2 | 4) && usize::from(offset % 4) + length <= 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_bridge_is_found_by_memory_and_by_ports() {
        let root = Root::new(vec![]);
        let mut memory = [0xFF; 4];
        root.config_read(0, &mut memory);
        assert_eq!(u32::from_le_bytes(memory), 0x0008_1B36);
        root.port_write(0, &0x8000_0000u32.to_le_bytes());
        let mut ports = [0xFF; 4];
        root.port_read(4, &mut ports);
        assert_eq!(memory, ports);
        let mut class = [0xFF; 2];
        root.port_write(0, &0x8000_0008u32.to_le_bytes());
        root.port_read(6, &mut class);
        assert_eq!(class, [0x00, 0x06]);
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let root = Root::new(vec![]);
        for offset in [0x8000, 0x1000, 0x10_0000, u64::MAX - 7] {
            let mut data = [0xFF; 4];
            root.config_read(offset, &mut data);
            root.config_write(offset, &data);
            assert_eq!(data, [0xFF; 4]);
        }
    }
}
