-- What clients and operators change: cancel, reopen, resolve.

-- cancel(root; id, event data, birth… or nothing): step 10. With a birth the record is made first, cancelled.
-- Answers {found, status, tier, worker, the data of job.cancelled or ''}; found: absent, cancelled_now, running,
-- already_cancelled, ended.
local function cancel(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec = load_record(k, CLAIM_FIELDS)
  if not rec then
    if #args < 2 + BIRTH then return { 'absent', '', '', '', '' } end
    rec = make_record(k, birth_of(args, 3), now, now)
  end
  if rec.status == 'cancelled' then return { 'already_cancelled', rec.status, rec.tier, '', '' } end
  if TERMINAL[rec.status] then return { 'ended', rec.status, rec.tier, '', '' } end
  if rec.status == 'queued' then
    local told = end_cancelled(k, rec, now, args[2])
    return { 'cancelled_now', rec.status, rec.tier, '', told }
  end
  if not rec.cancel then
    emit(k, rec, now, 'job.cancelling', '{"reached":"requested"}')
    tell(k, rec)
    redis.call('HSET', k.job, 'cancel', args[2], 'seq', rec.seq)
  end
  redis.call('PUBLISH', 'tf:ctl:' .. rec.worker, 'cancel ' .. k.id)
  return { 'running', rec.status, rec.tier, rec.worker, '' }
end

local function next_generation(k, rec, now, data)
  open_generation(k, rec, rec.generation + 1)
  emit(k, rec, now, 'job.queued', data)
end

-- reopen(root; id, event data): step 11 for failed and cancelled jobs.
-- Answers {verdict, status, task}; verdict: reopened, absent, not_allowed.
local function reopen(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec = load_record(k, CLAIM_FIELDS)
  if not rec then return { 'absent', '', '' } end
  local task = redis.call('HGET', k.job, 'task')
  if (rec.status ~= 'failed' and rec.status ~= 'cancelled') or not task then
    return { 'not_allowed', rec.status, '' }
  end
  drop_failed(k, rec)
  next_generation(k, rec, now, args[2])
  wait_again(k, rec, now, 0, 0)
  return { 'reopened', 'queued', task, rec.generation }
end

-- redrive(root; id, generation and fence of the newest dead letter, event data, ms for which letters are kept, birth…):
-- step 11 for a dead letter. The birth has the generation after the letter's, and makes the record where there is none.
-- Answers {verdict, status, task, generation}; verdict: reopened, answered (a later generation has begun since the
-- letter was written, be it gone or not), not_allowed.
local function redrive(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local generation, fence, data, birth = tonumber(args[2]), tonumber(args[3]), args[4], birth_of(args, 6)
  local answered = k.root .. ':letter:' .. k.id
  local rec, task = load_record(k, CLAIM_FIELDS), birth.task
  if fence <= tonumber(redis.call('GET', answered) or 0) or (rec and rec.generation > generation) then
    return { 'answered', rec and rec.status or '', '', rec and rec.generation or 0 }
  end
  if not rec then
    rec = make_record(k, birth, now, now, fence, data)
  else
    if rec.status ~= 'failed' and rec.status ~= 'cancelled' then
      return { 'not_allowed', rec.status, '', rec.generation }
    end
    task = redis.call('HGET', k.job, 'task') or task
    drop_failed(k, rec)
    -- Where Redis has lost writes, the letter knows of later attempts and generations than the record.
    rec.fence, rec.generation = math.max(rec.fence, fence), math.max(rec.generation, generation)
    redis.call('HSET', k.job, 'fence', rec.fence, 'task', task)
    next_generation(k, rec, now, data)
    wait_again(k, rec, now, 0, 0)
  end
  redis.call('SET', answered, fence, 'PX', args[5])
  return { 'reopened', 'queued', task, rec.generation }
end

-- resolve(root; id, call, decision, result payload or '', the decision as JSON): decides one call of an unknown job, once.
-- Answers {verdict, status, task, generation}; verdict: waiting (others are undecided), reopened (publish the task),
-- closed (ended with the decisions), absent, not_allowed, no_such_call, decided_already.
local function resolve(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec, call, decision = load_record(k, CLAIM_FIELDS), args[2], args[3]
  if not rec then return { 'absent', '', '' } end
  if redis.call('HEXISTS', k.job, 'd:' .. call) == 1 then return { 'decided_already', rec.status, '' } end
  if rec.status ~= 'unknown' then return { 'not_allowed', rec.status, '' } end
  if redis.call('HEXISTS', k.job, 'u:' .. call) == 0 then return { 'no_such_call', rec.status, '' } end
  redis.call('HSET', k.job, 'd:' .. call, '{"decided_at_ms":' .. now .. ',' .. string.sub(args[5], 2))
  redis.call('HDEL', k.job, 'u:' .. call, 'm:' .. call)
  if decision ~= 'rerun' then
    redis.call('HSET', k.res, call, args[4])
    redis.call('PEXPIRE', k.res, redis.call('PTTL', k.job))
  end
  local failed, done = 0, calls_of(k)
  for _, outcome in pairs(done) do
    if outcome == 'f' then failed = failed + 1 end
  end
  rec.done, rec.failed = count(done) - failed, failed
  redis.call('HSET', k.job, 'done', rec.done, 'failed', rec.failed)
  for _, field in ipairs(redis.call('HKEYS', k.job)) do
    if string.sub(field, 1, 2) == 'u:' then return { 'waiting', rec.status, '' } end
  end
  next_generation(k, rec, now, '{"reason":"resolved","decisions":' .. decisions_of(k) .. '}')
  if count(done) < rec.total then
    wait_again(k, rec, now, 0, 0)
    return { 'reopened', 'queued', redis.call('HGET', k.job, 'task'), rec.generation }
  end
  if failed > 0 then
    end_failed(k, rec, now, 'tool_failed', failed .. ' of ' .. rec.total .. ' calls failed, as decided')
  else
    finish_record(k, rec, now, 'completed', 'job.completed', '{"status":"completed"}', '')
  end
  return { 'closed', rec.status, '' }
end

redis.register_function('{prefix}_cancel', cancel)
redis.register_function('{prefix}_reopen', reopen)
redis.register_function('{prefix}_redrive', redrive)
redis.register_function('{prefix}_resolve', resolve)
