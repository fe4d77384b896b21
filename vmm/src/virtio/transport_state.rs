//! The registers of a device in a snapshot: what [`Transport`] saves, and what it checks before it takes them.
//!
//! The queues lie in guest memory. Of each the snapshot has the place, the size and the used index: at rest a device has
//! given back all chains before that index, so it is where to go on.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::queue::Queue;
use super::transport::{
    F_EVENT_IDX, F_VERSION_1, NO_VECTOR, Phase, QueueRegisters, STATUS_DRIVER_OK, STATUS_FEATURES_OK,
    STATUS_NEEDS_RESET, STATUS_WRITABLE, State, Transport,
};
use crate::mailbox::Message;
use crate::snapshot::codec::{Invalid, Reader, Writer};

/// Bytes of device configuration that are compared.
const CONFIG: usize = 256;

impl Transport {
    /// Writes all registers for a snapshot. The device is at rest and no message of it waits.
    pub fn save(&self, to: &mut Writer) {
        let state = self.state();
        to.u16(self.kind as u16);
        to.raw(state.pci.bytes());
        state.msix.save(to);
        to.bool(state.phase == Phase::Active);
        to.u8(state.status);
        to.u8(state.isr);
        to.u8(state.generation);
        to.u32(state.device_feature_select);
        to.u32(state.driver_feature_select);
        to.u64(state.driver_features);
        to.u16(state.config_vector);
        to.u16(state.queue_select);
        to.u16(u16::try_from(state.queues.len()).unwrap_or(u16::MAX));
        for queue in &state.queues {
            to.u16(queue.size);
            to.u16(queue.vector);
            to.bool(queue.enabled);
            to.u64(queue.descriptors);
            to.u64(queue.available);
            to.u64(queue.used);
            let at = GuestAddress(queue.used.wrapping_add(2));
            let enabled = queue.enabled && state.phase == Phase::Active;
            // Activation checked that an enabled queue lies in guest memory.
            let used = enabled.then(|| self.memory.load::<u16>(at, Ordering::Acquire).ok()).flatten();
            to.u16(u16::from_le(used.unwrap_or(0)));
        }
        let mut config = [0; CONFIG];
        self.config.read(0, &mut config);
        to.raw(&config);
    }

    /// Takes the registers of a snapshot into a device that no driver has touched. A device that was active is activated by
    /// the I/O thread's next turn, as if its driver had become ready and had kicked each queue.
    ///
    /// # Errors
    /// What does not fit this device, or cannot be.
    pub fn restore(&self, from: &mut Reader<'_>) -> Result<(), Invalid> {
        let mut state = self.state();
        let kind = from.u16("kind")?;
        if kind != self.kind as u16 {
            return Err(Invalid::Mismatch(format!("virtio device {kind}, here is a {:?}", self.kind)));
        }
        state.pci.restore(&from.array("PCI registers")?)?;
        let mut control = [0; 2];
        state.pci.read(state.msix_capability + 2, &mut control);
        state.msix.restore(from, u16::from_le_bytes(control))?;
        let active = from.bool("active")?;
        self.restore_registers(&mut state, from, active)?;
        let queues = self.restore_queues(&mut state, from)?;
        let mut config = [0; CONFIG];
        self.config.read(0, &mut config);
        state.config_differs = from.raw("configuration", CONFIG)? != config;
        if active {
            state.phase = Phase::Active;
            state.ready = Some(queues);
            state.early_kicks = u64::MAX;
            self.mailbox.post(Message::Activate(self.index));
        }
        self.follow_bar(&mut state);
        Ok(())
    }

    fn restore_registers(
        &self,
        state: &mut State,
        from: &mut Reader<'_>,
        active: bool,
    ) -> Result<(), Invalid> {
        let refuse = |what, value: u64| Err(Invalid::Value { what, value });
        state.status = from.u8("status")?;
        state.isr = from.u8("ISR")? & 3;
        state.generation = from.u8("generation")?;
        state.device_feature_select = from.u32("device feature select")?;
        state.driver_feature_select = from.u32("driver feature select")?;
        state.driver_features = from.u64("driver features")?;
        state.config_vector = self.restore_vector(state, from.u16("configuration vector")?)?;
        state.queue_select = from.u16("queue select")?;
        if state.status & !(STATUS_WRITABLE | STATUS_NEEDS_RESET) != 0 {
            return refuse("status", state.status.into());
        }
        let lacks = state.driver_features & !self.features;
        let agreed = state.status & STATUS_FEATURES_OK != 0;
        if agreed && lacks != 0 {
            return Err(Invalid::Mismatch(format!(
                "the driver uses features {lacks:#x}, which are not here"
            )));
        }
        let ready = STATUS_DRIVER_OK | STATUS_FEATURES_OK;
        if active && (state.status & ready != ready || state.driver_features & F_VERSION_1 == 0) {
            return refuse("status of an active device", state.status.into());
        }
        Ok(())
    }

    fn restore_vector(&self, state: &State, vector: u16) -> Result<u16, Invalid> {
        if vector != NO_VECTOR && usize::from(vector) >= state.msix.count() {
            return Err(Invalid::Value { what: "vector", value: vector.into() });
        }
        Ok(vector)
    }

    fn restore_queues(&self, state: &mut State, from: &mut Reader<'_>) -> Result<Vec<Queue>, Invalid> {
        let count = from.u16("queues")?;
        if usize::from(count) != state.queues.len() {
            let mine = state.queues.len();
            return Err(Invalid::Mismatch(format!("{count} queues, this device has {mine}")));
        }
        let event_idx = state.driver_features & F_EVENT_IDX != 0;
        // Such a device ignores its queues until its driver resets it.
        let failed = state.status & STATUS_NEEDS_RESET != 0;
        let mut queues = Vec::with_capacity(count.into());
        for (index, largest) in (0..).zip(&self.queue_sizes) {
            let size = from.u16("queue size")?;
            if !size.is_power_of_two() || size > *largest {
                return Err(Invalid::Value { what: "queue size", value: size.into() });
            }
            let vector = self.restore_vector(state, from.u16("queue vector")?)?;
            let enabled = from.bool("queue enabled")?;
            let [descriptors, available, used] =
                [from.u64("descriptor table")?, from.u64("available ring")?, from.u64("used ring")?];
            let registers = QueueRegisters { size, vector, enabled, descriptors, available, used };
            let position = from.u16("used index")?;
            let mut queue = if failed {
                Queue::disabled(index)
            } else {
                registers
                    .build(index, event_idx, &self.memory)
                    .map_err(|error| Invalid::Mismatch(format!("queue {index}: {error}")))?
            };
            queue.continue_at(position);
            queues.push(queue);
            if let Some(place) = state.queues.get_mut(usize::from(index)) {
                *place = registers;
            }
        }
        Ok(queues)
    }

    /// Interrupts the driver for each queue after a restore: one that was on its way when the snapshot was made is lost. A
    /// driver finds nothing new and goes on. When the device is not what it was (another address, another size) the
    /// driver is told too.
    pub fn wake_driver(&self) {
        let mut state = self.state();
        if state.phase != Phase::Active {
            return;
        }
        let vectors: Vec<u16> =
            state.queues.iter().filter(|queue| queue.enabled).map(|queue| queue.vector).collect();
        for vector in vectors {
            state.interrupt(vector, super::transport::ISR_QUEUE);
        }
        if std::mem::take(&mut state.config_differs) {
            state.config_interrupt();
        }
    }
}
