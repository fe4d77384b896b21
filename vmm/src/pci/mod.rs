//! The PCI root: one bus, the host bridge and one function per device, all present from the beginning.
//!
//! Configuration space is reached by ECAM only; the ports 0xCF8 and 0xCFC do not answer, so kernels need one exit and not
//! two for an access. Functions have no interrupt line, only MSI-X.

pub mod config;
pub mod msix;

use std::sync::Arc;

/// Most functions besides the host bridge: device numbers 1 to 31.
pub const FUNCTIONS_MAX: usize = 31;
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
        Self { bridge: HostBridge(config::ConfigSpace::new(&identity, None)), functions }
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
