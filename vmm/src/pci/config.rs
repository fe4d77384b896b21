//! Configuration space of one function (PCI Local Bus Specification 3.0 chapter 6): 256 bytes with a mask of what the guest
//! may write, one 64-bit memory BAR, a list of capabilities.

use crate::snapshot::codec::Invalid;

/// Bytes of configuration space.
pub const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: u8 = 0x40;
/// Memory decoding, bus master, no interrupt line: what a driver switches.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const COMMAND_MEMORY: u8 = 1 << 1;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// 64-bit, not prefetchable.
const BAR_64: u8 = 0b100;

/// What a function says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device of that vendor.
    pub device: u16,
    /// Class, subclass, programming interface.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Vendor of the subsystem.
    pub subsystem_vendor: u16,
    /// The subsystem.
    pub subsystem: u16,
}

/// A memory BAR of the size `size`, a power of two of at least 4 KiB, first placed at `address`.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    /// Where it is before the guest moves it.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The registers.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bar_size: Option<u64>,
    next_capability: u8,
    last_link: usize,
}

impl ConfigSpace {
    /// A function with this identity and, if any, BAR 0 (and 1, its upper half).
    pub fn new(identity: &Identity, bar: Option<Bar>) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: bar.map(|b| b.size),
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        let class = identity.class << 8 | u32::from(identity.revision);
        space.set(0x08, &class.to_le_bytes());
        space.set(0x2C, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2E, &identity.subsystem.to_le_bytes());
        if let Some(bar) = bar {
            space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
            space.set(BAR0, &(bar.address | u64::from(BAR_64)).to_le_bytes());
            space.allow(BAR0, &(!(bar.size - 1)).to_le_bytes());
            // The interrupt line register is scratch space for software.
            space.allow(0x3C, &[0xFF]);
        }
        space
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(mask) {
            *to = *from;
        }
    }

    /// Adds a capability: its id, its bytes behind the link, and which bits of them the guest may write. Answers the offset of
    /// the capability. There is room for what a virtio function has; what does not fit is left out.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_capability;
        let start = usize::from(at);
        let end = (start + 2 + body.len()).next_multiple_of(4);
        let Ok(next) = u8::try_from(end) else { return 0 };
        self.set(self.last_link, &[at]);
        self.set(start, &[id, 0]);
        self.set(start + 2, body);
        self.allow(start + 2, writable);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_link = start + 1;
        self.next_capability = next;
        at
    }

    /// Reads at `offset`. There is no extended configuration space; it reads as zeros.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset.into())) {
            *to = *from;
        }
    }

    /// Writes at `offset` what may be written there.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(offset.into());
        for ((register, mask), value) in registers.zip(data) {
            *register = *register & !mask | value & mask;
        }
    }

    /// All registers, for a snapshot.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes the registers of a snapshot.
    ///
    /// # Errors
    /// Something differs that a guest cannot write: it was another function.
    pub fn restore(&mut self, saved: &[u8; SIZE]) -> Result<(), Invalid> {
        let mine = self.bytes.iter().zip(&self.writable);
        let fixed = |(at, ((register, mask), saved)): (usize, ((&u8, &u8), &u8))| {
            (register & !mask != saved & !mask).then_some(at)
        };
        if let Some(at) = mine.zip(saved).enumerate().find_map(fixed) {
            return Err(Invalid::Mismatch(format!("PCI register {at:#x} is that of another device")));
        }
        self.bytes = *saved;
        Ok(())
    }

    /// Where the BAR is decoded now, if it is.
    pub fn bar(&self) -> Option<Bar> {
        let size = self.bar_size?;
        let mut command = [0; 1];
        self.read(4, &mut command);
        let [command] = command;
        let mut address = [0; 8];
        self.read(0x10, &mut address);
        let address = u64::from_le_bytes(address) & !(size - 1);
        let fits = address.checked_add(size).is_some();
        (command & COMMAND_MEMORY != 0 && fits).then_some(Bar { address, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1AF4,
            device: 0x1044,
            class: 0xFF_0000,
            revision: 1,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
        };
        ConfigSpace::new(&identity, Some(Bar { address: 0xD000_0000, size: 0x8000 }))
    }

    fn read(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = space();
        assert!(space.bar().is_none());
        space.write(0x10, &[0xFF; 4]);
        space.write(0x14, &[0xFF; 4]);
        assert_eq!((read(&space, 0x10), read(&space, 0x14)), (0xFFFF_8004, 0xFFFF_FFFF));
        space.write(0x04, &[2, 0]);
        // A BAR that ends beyond the last address is not decoded.
        assert!(space.bar().is_none());
        space.write(0x10, &0xD123_8000u32.to_le_bytes());
        space.write(0x14, &1u32.to_le_bytes());
        assert_eq!(space.bar().map(|b| b.address), Some(0x1_D123_8000));
        space.write(0x04, &[0, 0]);
        assert!(space.bar().is_none());
    }

    #[test]
    fn identity_and_capability_links_cannot_be_written() {
        let mut space = space();
        let first = space.add_capability(9, &[16, 1, 2], &[]);
        let second = space.add_capability(0x11, &[0, 0, 7], &[0, 0x80]);
        for offset in (0..256).step_by(4) {
            space.write(offset, &[0xFF; 4]);
        }
        assert_eq!(read(&space, 0), 0x1044_1AF4);
        assert_eq!(read(&space, 0x34) & 0xFF, u32::from(first));
        // The bytes 16, 1 behind id and link.
        assert_eq!(read(&space, first.into()), 0x0110_0009 | u32::from(second) << 8);
        assert_eq!(read(&space, second.into()) >> 24, 0x80);
    }
}
