//! Builds that follow each other talk to each other: what `contracts.txt` says was spoken once is spoken still.
//!
//! The file has a line for each field, value and method, in the form that this test prints. A line is added to it with whatever
//! is new; none is taken out or changed for as long as builds run that speak it.

use std::collections::{BTreeMap, BTreeSet};

use baton_proto::FILE_DESCRIPTOR_SET;
use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};

/// A line for each thing that has to stay, by what identifies it on the wire: a field's number, not its name.
#[derive(Default)]
struct Contracts(BTreeMap<String, String>);

impl Contracts {
    fn present() -> Self {
        let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("the build made it");
        let mut contracts = Self::default();
        for file in set.file.iter().filter(|file| file.package() == "baton.v1") {
            file.message_type.iter().for_each(|message| contracts.message("", message));
            file.enum_type.iter().for_each(|one| contracts.values("", one));
            file.service.iter().for_each(|service| contracts.service(service));
        }
        contracts
    }

    fn message(&mut self, within: &str, message: &DescriptorProto) {
        let name = format!("{within}{}", message.name());
        for field in &message.field {
            let repeated = if field.label() == Label::Repeated { "repeated " } else { "" };
            let kind = match field.r#type() {
                Type::Message | Type::Enum => field.type_name().trim_start_matches(".baton.v1.").to_owned(),
                scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
            };
            // A field that alone may be left out is a choice of its own, which is nobody else's affair.
            let choice = field.oneof_index.filter(|_| !field.proto3_optional());
            let choice = choice.and_then(|index| message.oneof_decl.get(usize::try_from(index).ok()?));
            let choice = choice.map_or_else(String::new, |choice| format!(", one of {}", choice.name()));
            self.0.insert(format!("{name} {}", field.number()), format!("{repeated}{kind}{choice}"));
        }
        message.nested_type.iter().for_each(|inner| self.message(&format!("{name}."), inner));
        message.enum_type.iter().for_each(|inner| self.values(&format!("{name}."), inner));
    }

    fn values(&mut self, within: &str, of: &EnumDescriptorProto) {
        for value in &of.value {
            self.0.insert(format!("{within}{} {}", of.name(), value.number()), value.name().to_owned());
        }
    }

    fn service(&mut self, service: &ServiceDescriptorProto) {
        for method in &service.method {
            let end = |streams, message: &str| {
                let message = message.trim_start_matches(".baton.v1.");
                if streams { format!("stream {message}") } else { message.to_owned() }
            };
            let ends = [
                end(method.client_streaming(), method.input_type()),
                end(method.server_streaming(), method.output_type()),
            ];
            self.0.insert(format!("{}/{}", service.name(), method.name()), ends.join(" -> "));
        }
    }

    fn lines(&self) -> BTreeSet<String> {
        self.0.iter().map(|(what, is)| format!("{what}: {is}")).collect()
    }
}

#[test]
fn what_was_spoken_is_spoken_still() {
    let released = include_str!("contracts.txt");
    let present = Contracts::present().lines();
    let released: BTreeSet<String> = released.lines().map(str::to_owned).collect();
    let lines = |of: &BTreeSet<String>, without: &BTreeSet<String>| {
        of.difference(without).cloned().collect::<Vec<_>>().join("\n")
    };
    let (gone, new) = (lines(&released, &present), lines(&present, &released));
    assert!(gone.is_empty(), "builds of before speak this, and it is gone or another by now:\n{gone}");
    assert!(new.is_empty(), "this is new: builds to come are held to it once it is in contracts.txt:\n{new}");
    assert!(released.len() > 300, "there is hardly anything to hold to");
}
