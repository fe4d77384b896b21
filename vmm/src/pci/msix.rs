//! MSI-X of one function (PCI Local Bus Specification 3.0 section 6.8.2): table, pending bits, enable and mask.

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::interrupt::{Routes, Vector};
use crate::snapshot::codec::{Invalid, Reader, Writer};

/// Bytes of a table entry.
pub const ENTRY: usize = 16;
const MASKED: u32 = 1;
/// Control bits of the capability.
const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;

struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    /// The way into the kernel; made when the vector is first used.
    vector: Option<Vector>,
    /// The kernel raises it without us: masks are passed on to it.
    connected: bool,
}

/// Table and state.
pub struct MsiX {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
    routes: Arc<Routes>,
}

impl MsiX {
    /// `count` masked vectors.
    pub fn new(count: u16, routes: Arc<Routes>) -> Self {
        let entry =
            || Entry { address: 0, data: 0, control: MASKED, pending: false, vector: None, connected: false };
        Self { entries: (0..count).map(|_| entry()).collect(), enabled: false, masked: false, routes }
    }

    /// The control word of the capability was written.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & ENABLE != 0;
        self.masked = control & FUNCTION_MASK != 0;
        self.follow_masks();
        self.deliver_pending();
    }

    /// True when the guest uses MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Number of vectors.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Reads the table at byte `offset`.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        if let Some(entry) = self.entries.get(offset / ENTRY) {
            let bytes = entry.bytes();
            for (to, from) in data.iter_mut().zip(bytes.iter().skip(offset % ENTRY)) {
                *to = *from;
            }
        }
    }

    /// Writes the table at byte `offset`; accesses have 4 or 8 aligned bytes, others do nothing.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) {
            return;
        }
        let Some(entry) = self.entries.get_mut(offset / ENTRY) else { return };
        let mut bytes = entry.bytes();
        for (to, from) in bytes.iter_mut().skip(offset % ENTRY).zip(data) {
            *to = *from;
        }
        entry.set_bytes(bytes);
        self.follow_masks();
        self.deliver_pending();
    }

    /// Reads the pending bits at byte `offset`.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let bits = self.entries.iter().skip(at.saturating_mul(8)).take(8);
            *byte = bits.rev().fold(0, |all, entry| all << 1 | u8::from(entry.pending));
        }
    }

    /// Raises `vector`; one that is masked is remembered, one that is not there is ignored.
    pub fn raise(&mut self, vector: u16) {
        let blocked = !self.enabled || self.masked;
        let Some(entry) = self.entries.get_mut(usize::from(vector)) else { return };
        if blocked || entry.control & MASKED != 0 {
            entry.pending = true;
        } else {
            entry.send(&self.routes);
        }
    }

    /// Writes the table and the pending bits for a snapshot. Enable and mask are in configuration space.
    pub fn save(&self, to: &mut Writer) {
        to.u16(u16::try_from(self.entries.len()).unwrap_or(u16::MAX));
        for entry in &self.entries {
            to.raw(&entry.bytes());
            to.bool(entry.pending);
        }
    }

    /// Takes those of a snapshot and the control word. Nothing is sent.
    ///
    /// # Errors
    /// There is another number of vectors.
    pub fn restore(&mut self, from: &mut Reader<'_>, control: u16) -> Result<(), Invalid> {
        let count = from.u16("MSI-X vectors")?;
        if usize::from(count) != self.entries.len() {
            let mine = self.entries.len();
            return Err(Invalid::Mismatch(format!("{count} MSI-X vectors, this device has {mine}")));
        }
        for entry in &mut self.entries {
            entry.set_bytes(from.array("MSI-X vector")?);
            entry.pending = from.bool("pending bit")?;
        }
        self.enabled = control & ENABLE != 0;
        self.masked = control & FUNCTION_MASK != 0;
        Ok(())
    }

    /// An event that raises `vector` without us from now on, as long as it is not masked; nothing when the driver does not
    /// use MSI-X or the kernel has no way for it. The event lives as long as this table.
    pub fn connect(&mut self, vector: u16) -> Option<RawFd> {
        if !self.enabled {
            return None;
        }
        let entry = self.entries.get_mut(usize::from(vector))?;
        if entry.vector.is_none() {
            entry.vector = self.routes.reserve(entry.address, entry.data);
        }
        let fd = entry.vector.as_ref()?.fd()?;
        entry.connected = true;
        self.follow_masks();
        Some(fd)
    }

    fn follow_masks(&mut self) {
        let masked = !self.enabled || self.masked;
        for entry in self.entries.iter_mut().filter(|e| e.connected) {
            if let Some(vector) = &mut entry.vector {
                let open = !masked && entry.control & MASKED == 0;
                vector.connect(&self.routes, entry.address, entry.data, open);
            }
        }
    }

    fn deliver_pending(&mut self) {
        if !self.enabled || self.masked {
            return;
        }
        for entry in self.entries.iter_mut().filter(|e| e.pending && e.control & MASKED == 0) {
            entry.pending = false;
            entry.send(&self.routes);
        }
    }

    /// How often the kernel refused an interrupt.
    pub fn routes(&self) -> &Arc<Routes> {
        &self.routes
    }
}

impl Entry {
    fn bytes(&self) -> [u8; ENTRY] {
        let whole = u128::from(self.address) | u128::from(self.data) << 64 | u128::from(self.control) << 96;
        whole.to_le_bytes()
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY]) {
        let whole = u128::from_le_bytes(bytes);
        let part = |shift: u32| u32::try_from(whole >> shift & 0xFFFF_FFFF).unwrap_or(0);
        self.address = u64::from(part(0)) | u64::from(part(32)) << 32;
        self.data = part(64);
        self.control = part(96) & MASKED;
    }

    fn send(&mut self, routes: &Routes) {
        match &mut self.vector {
            Some(vector) => vector.send(routes, self.address, self.data),
            none => *none = routes.first_send(self.address, self.data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::Routes;

    fn msix() -> (MsiX, Arc<Routes>) {
        let routes = Arc::new(Routes::for_test());
        (MsiX::new(3, routes.clone()), routes)
    }

    fn program(msix: &mut MsiX, vector: usize, data: u32, control: u32) {
        msix.write_table(vector * ENTRY, &0xFEE0_0000u64.to_le_bytes());
        msix.write_table(vector * ENTRY + 8, &data.to_le_bytes());
        msix.write_table(vector * ENTRY + 12, &control.to_le_bytes());
    }

    #[test]
    fn a_masked_vector_is_pending_until_unmasked_and_comes_once() {
        let (mut msix, routes) = msix();
        msix.set_control(ENABLE);
        program(&mut msix, 1, 0x41, MASKED);
        msix.raise(1);
        msix.raise(1);
        let mut pending = [0];
        msix.read_pending(0, &mut pending);
        assert_eq!((pending, routes.sent()), ([0b10], vec![]));
        program(&mut msix, 1, 0x42, 0);
        assert_eq!(routes.sent(), [(0xFEE0_0000, 0x42)]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0]);
    }

    #[test]
    fn nothing_is_sent_while_disabled_or_masked_as_a_whole() {
        let (mut msix, routes) = msix();
        program(&mut msix, 0, 0x41, 0);
        msix.raise(0);
        msix.set_control(ENABLE | FUNCTION_MASK);
        assert!(routes.sent().is_empty());
        msix.set_control(ENABLE);
        assert_eq!(routes.sent().len(), 1);
        msix.raise(7);
        assert_eq!(routes.sent().len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn no_access_panics(accesses: Vec<(u16, u64, u8)>) {
            let (mut msix, _) = msix();
            for (offset, value, length) in accesses {
                let mut data = value.to_le_bytes();
                let part = &mut data[..usize::from(length % 9)];
                msix.write_table(offset.into(), part);
                msix.read_table(offset.into(), part);
                msix.read_pending(offset.into(), part);
                msix.raise(offset);
                msix.set_control(offset);
            }
        }
    }
}
