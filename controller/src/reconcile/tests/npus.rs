//! NPUs by the ranktable: prefill and decode of a group have equally many.

use super::*;

impl World {
    fn hello_of_npus(&mut self, name: &str, address: &str) -> SessionId {
        self.last_session += 1;
        let session = SessionId(self.last_session);
        let mut spec = instance_spec(name, 1);
        (spec.device, spec.device_count) = ("ascend".into(), 8);
        spec.inference_endpoint = format!("{address}:7200");
        let beat = beat(Phase::Waiting, Role::None, 0);
        self.event(Event::Hello { session, spec: Box::new(spec), beat, unix_millis: 0 });
        session
    }
}

fn table(servers: &[(&str, u32)]) -> RankTable {
    let server = |(address, npus): &(&str, u32)| {
        let devices: Vec<_> = (0..*npus).map(|id| format!(r#"{{"device_id": "{id}"}}"#)).collect();
        format!(r#"{{"server_ip": "{address}", "device": [{}]}}"#, devices.join(","))
    };
    let servers: Vec<_> = servers.iter().map(server).collect();
    let text = format!(
        r#"{{"status": "completed", "server_group_list": [{{"server_list": [{}]}}]}}"#,
        servers.join(",")
    );
    RankTable::parse(&text).expect("a ranktable")
}

#[test]
fn the_ranktable_counts_whatever_servers_say() {
    let mut world = World::new();
    world.event(Event::RankTable(table(&[("10.0.0.1", 8), ("10.0.0.2", 8), ("10.0.0.3", 4)])));
    let sessions = ["a", "b", "c"].map(|name| {
        let address = format!("10.0.0.{}", u32::from(name.as_bytes()[0] - b'a') + 1);
        world.hello_of_npus(name, &address)
    });
    world.pass(secs(3), &sessions);
    assert_eq!(world.roles(), "pd0");
    let reason = world.last_assigned(sessions[2]).reason;
    let told = "its device count is 4, that of a is 8: those of a group have equally many devices";
    assert!(reason.contains(told), "{reason}");
    let stored = decode_spec(&world.stored["/baton/v1/instances/c"]).expect("a spec");
    assert_eq!(stored.device_count, 4);

    for session in sessions {
        world.obey(session);
    }
    world.event(Event::RankTable(table(&[("10.0.0.1", 8), ("10.0.0.2", 8), ("10.0.0.3", 8)])));
    world.pass(secs(3), &sessions);
    assert_ne!(world.last_assigned(sessions[2]).role, Role::None, "it can join now");
    world.event(Event::RankTable(table(&[("10.0.0.1", 4)])));
    let counts = |world: &World| {
        world.mind.members().values().map(|member| member.spec.device_count).collect::<Vec<_>>()
    };
    assert_eq!(counts(&world), [4, 8, 8], "of who is not in it, its own report counts");
}
