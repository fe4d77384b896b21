//! The sections that are about the VM as a whole. Devices and vCPUs write theirs themselves.

use super::Id;
use super::codec::{Invalid, Reader, Writer};
use crate::memory::pages::{EXTENTS_MAX, Extent};

/// Most devices of a VM.
const DEVICES_MAX: usize = crate::pci::FUNCTIONS_MAX;
/// Longest name of a device in bytes.
const DEVICE_NAME_MAX: usize = 28;

/// Section `machine`: what has to be the same in the VM that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Whether there is a boot timer.
    pub boot_timer: bool,
    /// Bytes of memory.
    pub memory: u64,
    /// Names of the devices in the order of the bus.
    pub devices: Vec<String>,
}

impl Machine {
    /// Writes the section.
    pub fn save(&self, to: &mut Writer) {
        to.u8(self.vcpus);
        to.bool(self.boot_timer);
        to.u64(self.memory);
        to.u32(u32::try_from(self.devices.len()).unwrap_or(u32::MAX));
        self.devices.iter().for_each(|name| to.bytes(name.as_bytes()));
    }

    /// Reads the section.
    ///
    /// # Errors
    /// It is cut off or has values that cannot be.
    pub fn restore(from: &mut Reader<'_>) -> Result<Self, Invalid> {
        let (vcpus, boot_timer, memory) = (from.u8("vCPUs")?, from.bool("boot timer")?, from.u64("memory")?);
        let count = from.count("devices", DEVICES_MAX)?;
        let name = |from: &mut Reader<'_>| {
            let bytes = from.bytes("device name", DEVICE_NAME_MAX)?;
            let plain = !bytes.is_empty() && bytes.iter().all(u8::is_ascii_graphic);
            let name = String::from_utf8_lossy(bytes).into_owned();
            if plain { Ok(name) } else { Err(Invalid::Mismatch("a device has no proper name".into())) }
        };
        let devices: Vec<String> = (0..count).map(|_| name(from)).collect::<Result<_, _>>()?;
        Ok(Self { vcpus, boot_timer, memory, devices })
    }
}

/// Section `memory`: what the memory file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// The snapshot's id.
    pub id: Id,
    /// What it is based on; a full snapshot is based on nothing.
    pub parent: Option<Id>,
    /// Of a diff: the pages that the file has; everything else is the parent's.
    pub extents: Vec<Extent>,
}

impl Memory {
    /// Writes the section.
    pub fn save(&self, to: &mut Writer) {
        to.raw(&self.id.0);
        to.bool(self.parent.is_some());
        to.raw(&self.parent.unwrap_or(Id([0; 16])).0);
        save_extents(&self.extents, to);
    }

    /// Reads the section of a memory of `pages` pages.
    ///
    /// # Errors
    /// It is cut off, or extents are out of order, overlap or lie outside.
    pub fn restore(from: &mut Reader<'_>, pages: u64) -> Result<Self, Invalid> {
        let id = Id(from.array("id")?);
        let is_diff = from.bool("diff")?;
        let parent = Id(from.array("parent")?);
        let extents = extents(from, pages)?;
        if !is_diff && !extents.is_empty() {
            return Err(Invalid::Mismatch("a full snapshot with extents".into()));
        }
        Ok(Self { id, parent: is_diff.then_some(parent), extents })
    }
}

/// Writes extents.
pub fn save_extents(extents: &[Extent], to: &mut Writer) {
    to.u32(u32::try_from(extents.len()).unwrap_or(u32::MAX));
    for (first, count) in extents {
        to.u32(*first);
        to.u32(*count);
    }
}

/// Reads extents of a memory of `pages` pages.
///
/// # Errors
/// They are too many, out of order, overlap or lie outside.
pub fn extents(from: &mut Reader<'_>, pages: u64) -> Result<Vec<Extent>, Invalid> {
    let count = from.count("extents", EXTENTS_MAX)?;
    let mut end = 0;
    let mut one = || {
        let (first, count) = (from.u32("extent")?, from.u32("extent")?);
        let behind = u64::from(first) + u64::from(count);
        if count == 0 || u64::from(first) < end || behind > pages {
            return Err(Invalid::Value { what: "extent", value: first.into() });
        }
        end = behind;
        Ok((first, count))
    };
    (0..count).map(|_| one()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(extents: &[Extent]) -> Result<Memory, Invalid> {
        let parent = Some(Id([2; 16]));
        let mut writer = Writer::new();
        Memory { id: Id([1; 16]), parent, extents: extents.to_vec() }.save(&mut writer);
        Memory::restore(&mut Reader::new(&writer.into_bytes()), 100)
    }

    #[test]
    fn extents_have_to_ascend_inside_memory() {
        assert_eq!(memory(&[(0, 5), (5, 1), (99, 1)]).unwrap().extents.len(), 3);
        for wrong in
            [[(0, 1), (0, 0)], [(5, 1), (4, 1)], [(0, 5), (4, 2)], [(0, 1), (99, 2)], [(0, 1), (1, u32::MAX)]]
        {
            assert!(memory(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_machine_survives_its_bytes() {
        let machine = Machine {
            vcpus: 3,
            boot_timer: true,
            memory: 1 << 27,
            devices: vec!["blk.root".into(), "rng".into()],
        };
        let mut writer = Writer::new();
        machine.save(&mut writer);
        assert_eq!(Machine::restore(&mut Reader::new(&writer.into_bytes())).unwrap(), machine);
    }
}
