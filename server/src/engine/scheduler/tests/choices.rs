//! Several choices of one prompt.

use super::*;

#[test]
fn choices_share_their_prompt_and_copy_its_last_block() {
    let mut scheduler = scheduler(20);
    scheduler.add(sequence(10, 6, 3, Work::Whole).asking(|asked| asked.choices = 3));
    assert_eq!(step(&mut scheduler, 1), [(10, 0, 6)]);
    assert_eq!(told(&mut scheduler), [0, 1, 2].map(|choice| (choice, 0, vec![1], false)));
    assert_eq!(scheduler.blocks.room(), 18, "the prompt is held once");
    assert_eq!(step(&mut scheduler, 1), [(10, 6, 1), (11, 6, 1), (12, 6, 1)]);
    assert_eq!(scheduler.take_copies().len(), 2, "the last to write does so in place");
    assert_eq!(scheduler.blocks.room(), 16);
    scheduler.cancel_choices(SequenceId(10), 1..2);
    assert_eq!(step(&mut scheduler, 1), [(10, 7, 1), (12, 7, 1)]);
    let ends = ends(&mut scheduler).into_iter().map(|(leg, _)| leg).collect::<Vec<_>>();
    assert_eq!((ends, scheduler.blocks.room()), (vec![10, 10, 10], 20));
}

#[test]
fn a_prefill_leg_seals_the_first_token_of_every_choice() {
    let mut scheduler = scheduler(20);
    scheduler.add(sequence(1, 6, 5, prefill()).asking(|asked| asked.choices = 3));
    scheduler.cancel_choices(SequenceId(1), 0..1);
    let plan = scheduler.schedule();
    scheduler.take_effects();
    // The second choice ends with its first token; the first has been cancelled, and is counted all the same.
    let sampled = [(0, 7), (1, 99), (2, 8)].map(|(choice, token)| Sampled { choice, token, logprobs: None });
    scheduler.computed(&plan[0], sampled.to_vec());
    let seal = Effect::Seal { id: SequenceId(1), first_tokens: FirstTokens::new(&[7, 99, 8]).expect("few") };
    assert_eq!(scheduler.take_effects(), [seal]);
    let expected =
        [(0, 0, vec![], true), (1, 0, vec![99], false), (2, 0, vec![8], false), (1, 1, vec![], true)];
    assert_eq!(told(&mut scheduler), expected);
    scheduler.transfer_ended(SequenceId(1), Ok(()));
    assert_eq!(told(&mut scheduler), [(2, 1, vec![], true)]);
}

#[test]
fn more_choices_than_sequences_are_refused_by_name() {
    let mut scheduler = scheduler(20);
    scheduler.add(sequence(1, 6, 5, Work::Whole).asking(|asked| asked.choices = 5));
    let ends = ends(&mut scheduler);
    assert_eq!(ends.len(), 5);
    for (_, end) in ends {
        let LegEnd::Failed(error) = end else { panic!("{end:?}") };
        assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidArgument, Some("n")));
    }
}
