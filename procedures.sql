-- procedures.sql: the tables and stored procedures that config.xml uses.
--
-- For Microsoft SQL Server 2012 or later (database compatibility level 110 or higher).
--
-- HOW TO RUN IT
--   First edit section 2: the cutover date and the names of your own tables.
--   SQL Server Management Studio: select the SIS database in the toolbar, open this file, press
--   Execute. Or, from a command prompt:
--     sqlcmd -S SERVER -d DATABASE -E -b -i procedures.sql
--   Run it again whenever it changes. Rerunning it keeps all data, permissions, and the cutover
--   date: existing tables are left alone, and procedures are altered, never dropped.
--
-- WHAT IT CREATES
--   in the schema samegoal   in the schema dbo
--   Settings                 (the cutover date)
--   Student                  (nothing: students are only read)
--   IEP                      sg_iep_upsert, sg_iep_delete
--   ServicesPlan             sg_services_plan_upsert, sg_services_plan_delete
--   EvaluationTeamReport     sg_evaluation_team_report_upsert, sg_evaluation_team_report_delete
--   SpecialEdDate            sg_special_ed_date_upsert, sg_special_ed_date_delete
--   ProgramFlag              sg_program_flag_upsert, sg_program_flag_delete, sg_cleanup
--   It creates and changes nothing outside the schema samegoal and the names dbo.sg_*.
--
-- WHAT IS AN ILLUSTRATION
--   SameGoal does not publish the files and columns of its nightly extract, and Infinite Campus
--   does not publish its base tables for IEPs and services plans. The tables, columns, and
--   parameters below illustrate both: compare them with your own extract and database, and change
--   table, procedure, and query together. Section 2 lists what is public.
--
-- RULES FOR EVERY PROCEDURE
--   * Parameters have the names and the order of the CSV file's columns. Every value is text or
--     NULL: dates YYYY-MM-DD, bits 0 or 1. The procedure converts and checks each value and
--     refuses a bad one with the row's key; it never shortens a value to fit.
--   * Nothing before the cutover date (samegoal.Settings) is touched: the queries in config.xml do
--     not show such rows, and the procedures refuse them.
--   * A call for a row that already matches changes nothing, not even modifiedDate. So a run that
--     was interrupted can simply be run again.
--   * Text is compared exactly (Latin1_General_BIN2), as in the nightly comparison. With the usual
--     case-insensitive collation, "Ab" and "AB" would match here but differ there, and the row
--     would come back every night.
--   * A completed document is locked. The query in config.xml shows whether it is, so a document
--     that staff unlocked counts as a difference, and the upsert locks it again.
--   * No row is ever deleted: special education records must be kept. A row that SameGoal no longer
--     has gets a retiredDate, and a program flag also an endDate. The queries in config.xml leave
--     retired rows out; your reports must do the same. If SameGoal sends the row again, the upsert
--     restores it.
--   * The transaction belongs to the caller: no procedure begins, commits, or rolls back.
--     XACT_ABORT is off, because with it one bad row would roll back its whole batch on the server,
--     and the rows after it would run, and stay, outside any transaction.
--   * Errors have number 50001 and name the record, the student number, and the key. No table,
--     parameter, or message holds a student's name. Deadlocks (1205), lock timeouts (1222), and
--     anything that dooms the transaction are rethrown unchanged, so that the caller can retry.

-- sqlcmd turns QUOTED_IDENTIFIER off, and a procedure keeps the setting it was created with.
SET ANSI_NULLS ON;
SET QUOTED_IDENTIFIER ON;
SET NOCOUNT ON;
GO

-- NOEXEC makes the server skip everything up to the last line of this file.
IF DB_ID() <= 4
BEGIN
    RAISERROR (N'This is a system database: select the SIS database first.', 16, 1);
    SET NOEXEC ON;
END;
GO

IF (SELECT compatibility_level FROM sys.databases WHERE database_id = DB_ID()) < 110
BEGIN
    RAISERROR (N'This database has a compatibility level below 110 (SQL Server 2012).', 16, 1);
    SET NOEXEC ON;
END;
GO

----------------------------------------------------------------------------------------------------
-- 1. The schema
----------------------------------------------------------------------------------------------------

-- Owned by dbo like the procedures, so executing a procedure needs no permission on the tables.
IF SCHEMA_ID(N'samegoal') IS NULL
    EXEC (N'CREATE SCHEMA samegoal AUTHORIZATION dbo;');
GO

----------------------------------------------------------------------------------------------------
-- 2. What your district sets: the cutover date and its own tables
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'samegoal.Settings') IS NULL
    CREATE TABLE samegoal.Settings (
        onlyRow bit NOT NULL
            CONSTRAINT PK_samegoal_Settings PRIMARY KEY
            CONSTRAINT CK_samegoal_Settings CHECK (onlyRow = 1),
        cutoverDate date NOT NULL
    );
GO

-- The cutover date: the first day that belongs to SameGoal. Records that start, meet, or are dated
-- before it are left exactly as they are. Put it here in place of NULL, for example '2024-07-01',
-- and nowhere else. NULL keeps the date of an earlier run, or 1900-01-01 (no cutover) if there was
-- none; no cutover is right only if every table is one that section 3 creates.
DECLARE @cutoverDate date = NULL;

UPDATE samegoal.Settings
SET cutoverDate = @cutoverDate
WHERE cutoverDate <> @cutoverDate;

INSERT INTO samegoal.Settings (onlyRow, cutoverDate)
SELECT 1, ISNULL(@cutoverDate, '1900-01-01')
WHERE NOT EXISTS (SELECT 1 FROM samegoal.Settings);
GO

-- YOUR OWN TABLES
-- On an empty database change nothing here: section 3 creates every table, and after
--     INSERT INTO samegoal.Student (studentNumber, stateID) VALUES (N'100001', N'AB1234567');
-- you can try the whole integration. For real use, give your own tables the names from section 3;
-- whatever has its name here is not created below. A name can be
--   * a synonym, if the table has the columns and types that section 3 shows:
--         CREATE SYNONYM samegoal.ProgramFlag FOR OtherDatabase.dbo.SpecialEdFlag;
--   * a view, if the columns have other names; with INSTEAD OF triggers if one row is stored in
--     more than one table.
-- Drop a table that an earlier run created before you give its name to something else.
-- Keep in mind:
--   * Set the cutover date above. The script stops without one if any of these names is yours.
--   * If a table also holds rows that SameGoal did not create, use a view that leaves them out;
--     otherwise all of them would be retired on the first night. (The limits in config.xml hold
--     such a run: do not force it.)
--   * retiredDate, and endedByExit of ProgramFlag, need a place. If the SIS has none, keep them in
--     a table of your own, join it in the view, and write both in the INSTEAD OF triggers.
--   * The table needs a unique index on the columns of the UNIQUE constraint in section 3. It keeps
--     two sessions from inserting the same record twice.
-- If a column is missing, ALTER PROCEDURE fails below, and its message names the column.
--
-- What Infinite Campus publishes (Campus help: "Special Ed Dates Tab (Ohio)", "EMIS Special Ed
-- Reported Fields (Ohio)"; the rest from SQL that districts have published):
--     section 3                            Infinite Campus
--     EvaluationTeamReport.meetingDate     Evaluation.date
--     EvaluationTeamReport.evaluationType  Evaluation.type
--     EvaluationTeamReport.referralDate    Evaluation.referralDate
--     SpecialEdDate.statusDate             SpecialEdDates.statusDate
--     SpecialEdDate.outcome                SpecialEdDates.outcome
--     SpecialEdDate.nonCompliance          SpecialEdDates.nonCompliance
--     SpecialEdDate.outcomeBeginningDate   SpecialEdDates.outcomeBeginningDate
--     SpecialEdDate.outcomeEndDate         SpecialEdDates.outcomeEndDate
--     ProgramFlag.flag                     Program.name
--     ProgramFlag.startDate, .endDate      ProgramParticipation.startDate, .endDate
-- Campus reports the evaluation's events (RFRL, CNST, IETR, RETR, TETR) from Evaluation itself. Do
-- not also write them to SpecialEdDates there, or the state gets them twice.
--
-- Infinite Campus keeps students in dbo.Person and their enrollments in dbo.Enrollment. This view
-- is enough to read them; remove the leading dashes to use it. It leaves out no-shows, enrollments
-- excluded from state reporting, and enrollments of next year; a student who has no others is not
-- in it. A student has left on the last day of the last enrollment, unless one is still open.
--
-- IF OBJECT_ID(N'samegoal.Student') IS NULL
--     EXEC (N'CREATE VIEW samegoal.Student AS SELECT 1 AS personID;');
-- GO
-- ALTER VIEW samegoal.Student
-- AS
-- SELECT
--     p.personID,
--     p.studentNumber,
--     p.stateID,
--     CASE WHEN COUNT(*) = COUNT(e.endDate) THEN CAST(MAX(e.endDate) AS date) END AS exitDate
-- FROM dbo.Person AS p
--     INNER JOIN dbo.Enrollment AS e ON e.personID = p.personID
-- WHERE p.studentNumber IS NOT NULL
--     AND ISNULL(e.noShow, 0) = 0
--     AND ISNULL(e.stateExclude, 0) = 0
--     AND e.endYear <= (SELECT MAX(y.endYear) FROM dbo.SchoolYear AS y WHERE y.active = 1)
-- GROUP BY p.personID, p.studentNumber, p.stateID;
-- GO
----------------------------------------------------------------------------------------------------

----------------------------------------------------------------------------------------------------
-- 3. Tables, created only where section 2 (or an earlier run) has not named something else
--
-- Their columns illustrate SameGoal's files. There are no foreign keys, because samegoal.Student
-- may be a view or a synonym.
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'samegoal.Student') IS NULL
    CREATE TABLE samegoal.Student (
        personID int IDENTITY (1, 1) NOT NULL CONSTRAINT PK_samegoal_Student PRIMARY KEY,
        -- SameGoal's limit for a student number is 20 characters.
        studentNumber nvarchar(20) COLLATE Latin1_General_BIN2 NOT NULL
            CONSTRAINT UQ_samegoal_Student UNIQUE,
        -- The student's ID in state reporting.
        stateID nvarchar(20) NULL,
        -- The day the student left the district; NULL if the student has not left.
        exitDate date NULL
    );
GO

IF OBJECT_ID(N'samegoal.IEP') IS NULL
    CREATE TABLE samegoal.IEP (
        iepID int IDENTITY (1, 1) NOT NULL CONSTRAINT PK_samegoal_IEP PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        startDate date NOT NULL,
        endDate date NULL,
        meetingDate date NULL,
        meetingType nvarchar(20) NULL,
        primaryDisability nvarchar(50) NULL,
        placement nvarchar(50) NULL,
        extendedSchoolYear bit NULL,
        specialTransportation bit NULL,
        alternateAssessment bit NULL,
        locked bit NOT NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_IEP UNIQUE CLUSTERED (personID, startDate),
        CONSTRAINT CK_samegoal_IEP_dates CHECK (endDate >= startDate)
    );
GO

IF OBJECT_ID(N'samegoal.ServicesPlan') IS NULL
    CREATE TABLE samegoal.ServicesPlan (
        servicesPlanID int IDENTITY (1, 1) NOT NULL
            CONSTRAINT PK_samegoal_ServicesPlan PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        startDate date NOT NULL,
        endDate date NULL,
        meetingDate date NULL,
        primaryDisability nvarchar(50) NULL,
        servingSchool nvarchar(100) NULL,
        specialTransportation bit NULL,
        locked bit NOT NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_ServicesPlan UNIQUE CLUSTERED (personID, startDate),
        CONSTRAINT CK_samegoal_ServicesPlan_dates CHECK (endDate >= startDate)
    );
GO

IF OBJECT_ID(N'samegoal.EvaluationTeamReport') IS NULL
    CREATE TABLE samegoal.EvaluationTeamReport (
        evaluationTeamReportID int IDENTITY (1, 1) NOT NULL
            CONSTRAINT PK_samegoal_EvaluationTeamReport PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        meetingDate date NOT NULL,
        evaluationType nvarchar(20) NULL,
        referralDate date NULL,
        consentDate date NULL,
        consentOutcome nvarchar(20) NULL,
        primaryDisability nvarchar(50) NULL,
        nonCompliance nvarchar(20) NULL,
        locked bit NOT NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_EvaluationTeamReport UNIQUE CLUSTERED (personID, meetingDate)
    );
GO

IF OBJECT_ID(N'samegoal.SpecialEdDate') IS NULL
    CREATE TABLE samegoal.SpecialEdDate (
        specialEdDateID int IDENTITY (1, 1) NOT NULL
            CONSTRAINT PK_samegoal_SpecialEdDate PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        -- The EMIS date type of SameGoal's crosswalk (GE100), such as RFRL, CNST, or IETR.
        eventType nvarchar(20) COLLATE Latin1_General_BIN2 NOT NULL,
        statusDate date NOT NULL,
        outcome nvarchar(20) NULL,
        nonCompliance nvarchar(20) NULL,
        outcomeBeginningDate date NULL,
        outcomeEndDate date NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_SpecialEdDate UNIQUE CLUSTERED (personID, eventType, statusDate),
        CONSTRAINT CK_samegoal_SpecialEdDate_dates CHECK (outcomeEndDate >= outcomeBeginningDate)
    );
GO

IF OBJECT_ID(N'samegoal.ProgramFlag') IS NULL
    CREATE TABLE samegoal.ProgramFlag (
        programFlagID int IDENTITY (1, 1) NOT NULL
            CONSTRAINT PK_samegoal_ProgramFlag PRIMARY KEY NONCLUSTERED,
        personID int NOT NULL,
        flag nvarchar(50) COLLATE Latin1_General_BIN2 NOT NULL,
        startDate date NOT NULL,
        endDate date NULL,
        -- 1: dbo.sg_cleanup set endDate because the student left. SameGoal does not know that date,
        -- so the comparison must see the flag as open, or the two would undo each other's work
        -- every night.
        endedByExit bit NOT NULL,
        retiredDate date NULL,
        modifiedDate datetime2(0) NOT NULL,
        CONSTRAINT UQ_samegoal_ProgramFlag UNIQUE CLUSTERED (personID, flag, startDate),
        CONSTRAINT CK_samegoal_ProgramFlag_dates CHECK (endDate >= startDate)
    );
GO

-- A table of the district's own holds records from before SameGoal: without a cutover date, the
-- first run would retire them.
IF (SELECT cutoverDate FROM samegoal.Settings) = '1900-01-01'
    AND (
        OBJECT_ID(N'samegoal.IEP', N'U') IS NULL
        OR OBJECT_ID(N'samegoal.ServicesPlan', N'U') IS NULL
        OR OBJECT_ID(N'samegoal.EvaluationTeamReport', N'U') IS NULL
        OR OBJECT_ID(N'samegoal.SpecialEdDate', N'U') IS NULL
        OR OBJECT_ID(N'samegoal.ProgramFlag', N'U') IS NULL
    )
BEGIN
    RAISERROR (
        N'Section 2 names a table of your own: set the cutover date there, then run this again.',
        16,
        1
    );
    SET NOEXEC ON;
END;
GO

----------------------------------------------------------------------------------------------------
-- 4. Helpers
--
-- A missing function or procedure is first created empty, then altered. ALTER keeps the permissions
-- granted on it; DROP and CREATE would lose them.
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'samegoal.to_date', N'FN') IS NULL
    EXEC (
        N'CREATE FUNCTION samegoal.to_date (@text nvarchar(4000)) RETURNS date '
        + N'AS BEGIN RETURN NULL; END;'
    );
GO

-- @text (YYYY-MM-DD) as a date; NULL for anything else. TRY_CONVERT alone would accept other
-- formats.
ALTER FUNCTION samegoal.to_date (@text nvarchar(4000))
RETURNS date
WITH SCHEMABINDING
AS
BEGIN
    RETURN CASE
        WHEN @text LIKE N'[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]'
            THEN TRY_CONVERT(date, @text, 120)
    END;
END;
GO

IF OBJECT_ID(N'samegoal.to_person_id', N'FN') IS NULL
    EXEC (
        N'CREATE FUNCTION samegoal.to_person_id (@studentNumber nvarchar(4000)) RETURNS int '
        + N'AS BEGIN RETURN NULL; END;'
    );
GO

-- The personID of the student with this number; NULL if no student or more than one has it.
ALTER FUNCTION samegoal.to_person_id (@studentNumber nvarchar(4000))
RETURNS int
AS
BEGIN
    DECLARE @personID int;

    -- The first condition can use an index with the column's collation; the second is exact.
    SELECT @personID = CASE WHEN MIN(personID) = MAX(personID) THEN MIN(personID) END
    FROM samegoal.Student
    WHERE studentNumber = @studentNumber
        AND studentNumber COLLATE Latin1_General_BIN2 = @studentNumber;

    RETURN @personID;
END;
GO

IF OBJECT_ID(N'samegoal.cutover_problem', N'FN') IS NULL
    EXEC (
        N'CREATE FUNCTION samegoal.cutover_problem (@column nvarchar(100), @date date) '
        + N'RETURNS nvarchar(4000) AS BEGIN RETURN NULL; END;'
    );
GO

-- What to tell the user if @date, the value of @column, is before the cutover date; otherwise NULL.
ALTER FUNCTION samegoal.cutover_problem (@column nvarchar(100), @date date)
RETURNS nvarchar(4000)
AS
BEGIN
    DECLARE @cutover date = (SELECT cutoverDate FROM samegoal.Settings);

    RETURN CASE
        WHEN @cutover IS NULL
            THEN N'samegoal.Settings has no cutover date. Try: run procedures.sql again'
        WHEN @date < @cutover
            THEN CONCAT(
                @column,
                N' is before the cutover date ',
                CONVERT(char(10), @cutover, 23),
                N'. Try: have SameGoal leave older records out of the extract, or correct the ',
                N'cutover date in section 2 of procedures.sql'
            )
    END;
END;
GO

IF OBJECT_ID(N'samegoal.fail', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE samegoal.fail AS SELECT 1;');
GO

-- Throws error 50001, "<record> of student <number>, <key>: <problem>". Unlike RAISERROR, THROW
-- also ends the calling procedure.
ALTER PROCEDURE samegoal.fail
    @record nvarchar(100),
    @studentNumber nvarchar(4000),
    @key nvarchar(4000),
    @problem nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @message nvarchar(2048) = @record
        + N' of student ' + ISNULL(LEFT(@studentNumber, 40), N'(no number)')
        + N', ' + ISNULL(LEFT(@key, 100), N'(no key)')
        + N': ' + LEFT(@problem, 700);

    -- THROW reads a percent sign as the start of a placeholder.
    SET @message = REPLACE(@message, N'%', N'%%');

    THROW 50001, @message, 1;
END;
GO

----------------------------------------------------------------------------------------------------
-- 5. IEPs (iep.csv; key: studentNumber, startDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_iep_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_iep_upsert AS SELECT 1;');
GO

-- Writes the IEP as the parameters give it, and locks it. UPDATE first, then INSERT if no row was
-- updated. A row that already matches is not updated either, so the INSERT checks that the row is
-- missing. UPDLOCK and HOLDLOCK keep others off the key, even a key that does not exist yet, until
-- the caller's transaction ends.
ALTER PROCEDURE dbo.sg_iep_upsert
    @studentNumber nvarchar(4000),
    @startDate nvarchar(4000),
    @endDate nvarchar(4000),
    @meetingDate nvarchar(4000),
    @meetingType nvarchar(4000),
    @primaryDisability nvarchar(4000),
    @placement nvarchar(4000),
    @extendedSchoolYear nvarchar(4000),
    @specialTransportation nvarchar(4000),
    @alternateAssessment nvarchar(4000),
    @locked nvarchar(4000) = N'1'
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @end date = samegoal.to_date(@endDate);
    DECLARE @meeting date = samegoal.to_date(@meetingDate);
    DECLARE @esy bit = TRY_CONVERT(bit, @extendedSchoolYear);
    DECLARE @transport bit = TRY_CONVERT(bit, @specialTransportation);
    DECLARE @alternate bit = TRY_CONVERT(bit, @alternateAssessment);
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'startDate', @start);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
        WHEN @endDate IS NOT NULL AND @end IS NULL THEN N'endDate is not a date (YYYY-MM-DD)'
        WHEN @end < @start THEN N'endDate is before startDate'
        WHEN @meetingDate IS NOT NULL AND @meeting IS NULL
            THEN N'meetingDate is not a date (YYYY-MM-DD)'
        WHEN LEN(@meetingType) > 20 THEN N'meetingType is longer than 20 characters'
        WHEN LEN(@primaryDisability) > 50 THEN N'primaryDisability is longer than 50 characters'
        WHEN LEN(@placement) > 50 THEN N'placement is longer than 50 characters'
        WHEN @extendedSchoolYear NOT IN (N'0', N'1') THEN N'extendedSchoolYear is not 0 or 1'
        WHEN @specialTransportation NOT IN (N'0', N'1') THEN N'specialTransportation is not 0 or 1'
        WHEN @alternateAssessment NOT IN (N'0', N'1') THEN N'alternateAssessment is not 0 or 1'
        WHEN ISNULL(@locked, N'') <> N'1' THEN N'locked is not 1: a completed document is locked'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'IEP', @studentNumber, @startDate, @problem;

    BEGIN TRY
        UPDATE samegoal.IEP WITH (UPDLOCK, HOLDLOCK)
        SET
            endDate = @end,
            meetingDate = @meeting,
            meetingType = @meetingType,
            primaryDisability = @primaryDisability,
            placement = @placement,
            extendedSchoolYear = @esy,
            specialTransportation = @transport,
            alternateAssessment = @alternate,
            locked = 1,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND startDate = @start
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT
                        endDate,
                        meetingDate,
                        meetingType COLLATE Latin1_General_BIN2,
                        primaryDisability COLLATE Latin1_General_BIN2,
                        placement COLLATE Latin1_General_BIN2,
                        extendedSchoolYear,
                        specialTransportation,
                        alternateAssessment,
                        locked
                    EXCEPT
                    SELECT
                        @end,
                        @meeting,
                        @meetingType,
                        @primaryDisability,
                        @placement,
                        @esy,
                        @transport,
                        @alternate,
                        CAST(1 AS bit)
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.IEP (
                personID,
                startDate,
                endDate,
                meetingDate,
                meetingType,
                primaryDisability,
                placement,
                extendedSchoolYear,
                specialTransportation,
                alternateAssessment,
                locked,
                modifiedDate
            )
            SELECT
                @personID,
                @start,
                @end,
                @meeting,
                @meetingType,
                @primaryDisability,
                @placement,
                @esy,
                @transport,
                @alternate,
                1,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.IEP WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND startDate = @start
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'IEP', @studentNumber, @startDate, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_iep_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_iep_delete AS SELECT 1;');
GO

-- Retires the IEP. If it does not exist or is already retired, nothing changes.
ALTER PROCEDURE dbo.sg_iep_delete
    @studentNumber nvarchar(4000),
    @startDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @today date = SYSDATETIME();
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'startDate', @start);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'IEP', @studentNumber, @startDate, @problem;

    BEGIN TRY
        UPDATE samegoal.IEP
        SET
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND startDate = @start
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'IEP', @studentNumber, @startDate, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 6. Services plans (services_plan.csv; key: studentNumber, startDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_services_plan_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_services_plan_upsert AS SELECT 1;');
GO

-- Like dbo.sg_iep_upsert.
ALTER PROCEDURE dbo.sg_services_plan_upsert
    @studentNumber nvarchar(4000),
    @startDate nvarchar(4000),
    @endDate nvarchar(4000),
    @meetingDate nvarchar(4000),
    @primaryDisability nvarchar(4000),
    @servingSchool nvarchar(4000),
    @specialTransportation nvarchar(4000),
    @locked nvarchar(4000) = N'1'
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @end date = samegoal.to_date(@endDate);
    DECLARE @meeting date = samegoal.to_date(@meetingDate);
    DECLARE @transport bit = TRY_CONVERT(bit, @specialTransportation);
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'startDate', @start);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
        WHEN @endDate IS NOT NULL AND @end IS NULL THEN N'endDate is not a date (YYYY-MM-DD)'
        WHEN @end < @start THEN N'endDate is before startDate'
        WHEN @meetingDate IS NOT NULL AND @meeting IS NULL
            THEN N'meetingDate is not a date (YYYY-MM-DD)'
        WHEN LEN(@primaryDisability) > 50 THEN N'primaryDisability is longer than 50 characters'
        WHEN LEN(@servingSchool) > 100 THEN N'servingSchool is longer than 100 characters'
        WHEN @specialTransportation NOT IN (N'0', N'1') THEN N'specialTransportation is not 0 or 1'
        WHEN ISNULL(@locked, N'') <> N'1' THEN N'locked is not 1: a completed document is locked'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'services plan', @studentNumber, @startDate, @problem;

    BEGIN TRY
        UPDATE samegoal.ServicesPlan WITH (UPDLOCK, HOLDLOCK)
        SET
            endDate = @end,
            meetingDate = @meeting,
            primaryDisability = @primaryDisability,
            servingSchool = @servingSchool,
            specialTransportation = @transport,
            locked = 1,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND startDate = @start
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT
                        endDate,
                        meetingDate,
                        primaryDisability COLLATE Latin1_General_BIN2,
                        servingSchool COLLATE Latin1_General_BIN2,
                        specialTransportation,
                        locked
                    EXCEPT
                    SELECT
                        @end,
                        @meeting,
                        @primaryDisability,
                        @servingSchool,
                        @transport,
                        CAST(1 AS bit)
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.ServicesPlan (
                personID,
                startDate,
                endDate,
                meetingDate,
                primaryDisability,
                servingSchool,
                specialTransportation,
                locked,
                modifiedDate
            )
            SELECT
                @personID,
                @start,
                @end,
                @meeting,
                @primaryDisability,
                @servingSchool,
                @transport,
                1,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.ServicesPlan WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND startDate = @start
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'services plan', @studentNumber, @startDate, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_services_plan_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_services_plan_delete AS SELECT 1;');
GO

-- Like dbo.sg_iep_delete.
ALTER PROCEDURE dbo.sg_services_plan_delete
    @studentNumber nvarchar(4000),
    @startDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @today date = SYSDATETIME();
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'startDate', @start);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'services plan', @studentNumber, @startDate, @problem;

    BEGIN TRY
        UPDATE samegoal.ServicesPlan
        SET
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND startDate = @start
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'services plan', @studentNumber, @startDate, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 7. Evaluation team reports (evaluation_team_report.csv; key: studentNumber, meetingDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_evaluation_team_report_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_evaluation_team_report_upsert AS SELECT 1;');
GO

-- Like dbo.sg_iep_upsert.
ALTER PROCEDURE dbo.sg_evaluation_team_report_upsert
    @studentNumber nvarchar(4000),
    @meetingDate nvarchar(4000),
    @evaluationType nvarchar(4000),
    @referralDate nvarchar(4000),
    @consentDate nvarchar(4000),
    @consentOutcome nvarchar(4000),
    @primaryDisability nvarchar(4000),
    @nonCompliance nvarchar(4000),
    @locked nvarchar(4000) = N'1'
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @meeting date = samegoal.to_date(@meetingDate);
    DECLARE @referral date = samegoal.to_date(@referralDate);
    DECLARE @consent date = samegoal.to_date(@consentDate);
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'meetingDate', @meeting);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @meeting IS NULL THEN N'meetingDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
        WHEN LEN(@evaluationType) > 20 THEN N'evaluationType is longer than 20 characters'
        WHEN @referralDate IS NOT NULL AND @referral IS NULL
            THEN N'referralDate is not a date (YYYY-MM-DD)'
        WHEN @consentDate IS NOT NULL AND @consent IS NULL
            THEN N'consentDate is not a date (YYYY-MM-DD)'
        WHEN LEN(@consentOutcome) > 20 THEN N'consentOutcome is longer than 20 characters'
        WHEN LEN(@primaryDisability) > 50 THEN N'primaryDisability is longer than 50 characters'
        WHEN LEN(@nonCompliance) > 20 THEN N'nonCompliance is longer than 20 characters'
        WHEN ISNULL(@locked, N'') <> N'1' THEN N'locked is not 1: a completed document is locked'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'evaluation team report', @studentNumber, @meetingDate, @problem;

    BEGIN TRY
        UPDATE samegoal.EvaluationTeamReport WITH (UPDLOCK, HOLDLOCK)
        SET
            evaluationType = @evaluationType,
            referralDate = @referral,
            consentDate = @consent,
            consentOutcome = @consentOutcome,
            primaryDisability = @primaryDisability,
            nonCompliance = @nonCompliance,
            locked = 1,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND meetingDate = @meeting
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT
                        evaluationType COLLATE Latin1_General_BIN2,
                        referralDate,
                        consentDate,
                        consentOutcome COLLATE Latin1_General_BIN2,
                        primaryDisability COLLATE Latin1_General_BIN2,
                        nonCompliance COLLATE Latin1_General_BIN2,
                        locked
                    EXCEPT
                    SELECT
                        @evaluationType,
                        @referral,
                        @consent,
                        @consentOutcome,
                        @primaryDisability,
                        @nonCompliance,
                        CAST(1 AS bit)
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.EvaluationTeamReport (
                personID,
                meetingDate,
                evaluationType,
                referralDate,
                consentDate,
                consentOutcome,
                primaryDisability,
                nonCompliance,
                locked,
                modifiedDate
            )
            SELECT
                @personID,
                @meeting,
                @evaluationType,
                @referral,
                @consent,
                @consentOutcome,
                @primaryDisability,
                @nonCompliance,
                1,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.EvaluationTeamReport WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND meetingDate = @meeting
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'evaluation team report', @studentNumber, @meetingDate, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_evaluation_team_report_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_evaluation_team_report_delete AS SELECT 1;');
GO

-- Like dbo.sg_iep_delete.
ALTER PROCEDURE dbo.sg_evaluation_team_report_delete
    @studentNumber nvarchar(4000),
    @meetingDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @meeting date = samegoal.to_date(@meetingDate);
    DECLARE @today date = SYSDATETIME();
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'meetingDate', @meeting);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @meeting IS NULL THEN N'meetingDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'evaluation team report', @studentNumber, @meetingDate, @problem;

    BEGIN TRY
        UPDATE samegoal.EvaluationTeamReport
        SET
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND meetingDate = @meeting
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'evaluation team report', @studentNumber, @meetingDate, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 8. Special education dates (special_ed_dates.csv; key: studentNumber, eventType, statusDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_special_ed_date_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_special_ed_date_upsert AS SELECT 1;');
GO

-- Like dbo.sg_iep_upsert. EMIS writes 00000000 for a date that an event does not have, such as the
-- outcome beginning date of an IETR. It is stored as NULL; the query shows it as 00000000 again.
ALTER PROCEDURE dbo.sg_special_ed_date_upsert
    @studentNumber nvarchar(4000),
    @eventType nvarchar(4000),
    @statusDate nvarchar(4000),
    @outcome nvarchar(4000),
    @nonCompliance nvarchar(4000),
    @outcomeBeginningDate nvarchar(4000),
    @outcomeEndDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    SET @outcomeBeginningDate = NULLIF(@outcomeBeginningDate, N'00000000');
    SET @outcomeEndDate = NULLIF(@outcomeEndDate, N'00000000');

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @status date = samegoal.to_date(@statusDate);
    DECLARE @begin date = samegoal.to_date(@outcomeBeginningDate);
    DECLARE @end date = samegoal.to_date(@outcomeEndDate);
    DECLARE @key nvarchar(4000) = CONCAT(@eventType, N' ', @statusDate);
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'statusDate', @status);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @eventType IS NULL THEN N'eventType is missing'
        WHEN LEN(@eventType) > 20 THEN N'eventType is longer than 20 characters'
        WHEN @status IS NULL THEN N'statusDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
        WHEN LEN(@outcome) > 20 THEN N'outcome is longer than 20 characters'
        WHEN LEN(@nonCompliance) > 20 THEN N'nonCompliance is longer than 20 characters'
        WHEN @outcomeBeginningDate IS NOT NULL AND @begin IS NULL
            THEN N'outcomeBeginningDate is not a date (YYYY-MM-DD)'
        WHEN @outcomeEndDate IS NOT NULL AND @end IS NULL
            THEN N'outcomeEndDate is not a date (YYYY-MM-DD)'
        WHEN @end < @begin THEN N'outcomeEndDate is before outcomeBeginningDate'
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'special education date', @studentNumber, @key, @problem;

    BEGIN TRY
        UPDATE samegoal.SpecialEdDate WITH (UPDLOCK, HOLDLOCK)
        SET
            outcome = @outcome,
            nonCompliance = @nonCompliance,
            outcomeBeginningDate = @begin,
            outcomeEndDate = @end,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND eventType COLLATE Latin1_General_BIN2 = @eventType
            AND statusDate = @status
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT
                        outcome COLLATE Latin1_General_BIN2,
                        nonCompliance COLLATE Latin1_General_BIN2,
                        outcomeBeginningDate,
                        outcomeEndDate
                    EXCEPT
                    SELECT
                        @outcome,
                        @nonCompliance,
                        @begin,
                        @end
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.SpecialEdDate (
                personID,
                eventType,
                statusDate,
                outcome,
                nonCompliance,
                outcomeBeginningDate,
                outcomeEndDate,
                modifiedDate
            )
            SELECT
                @personID,
                @eventType,
                @status,
                @outcome,
                @nonCompliance,
                @begin,
                @end,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.SpecialEdDate WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND eventType COLLATE Latin1_General_BIN2 = @eventType
                    AND statusDate = @status
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'special education date', @studentNumber, @key, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_special_ed_date_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_special_ed_date_delete AS SELECT 1;');
GO

-- Like dbo.sg_iep_delete.
ALTER PROCEDURE dbo.sg_special_ed_date_delete
    @studentNumber nvarchar(4000),
    @eventType nvarchar(4000),
    @statusDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @status date = samegoal.to_date(@statusDate);
    DECLARE @today date = SYSDATETIME();
    DECLARE @key nvarchar(4000) = CONCAT(@eventType, N' ', @statusDate);
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'statusDate', @status);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @eventType IS NULL THEN N'eventType is missing'
        WHEN @status IS NULL THEN N'statusDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'special education date', @studentNumber, @key, @problem;

    BEGIN TRY
        UPDATE samegoal.SpecialEdDate
        SET
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND eventType COLLATE Latin1_General_BIN2 = @eventType
            AND statusDate = @status
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'special education date', @studentNumber, @key, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 9. Program flags (program_flags.csv; key: studentNumber, flag, startDate)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_program_flag_upsert', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_program_flag_upsert AS SELECT 1;');
GO

-- A flag that dbo.sg_cleanup ended counts as open here, as in the query in config.xml. A student
-- can have a flag only once at a time: a second active one is refused, even if the first one
-- started before the cutover date.
ALTER PROCEDURE dbo.sg_program_flag_upsert
    @studentNumber nvarchar(4000),
    @flag nvarchar(4000),
    @startDate nvarchar(4000),
    @endDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @end date = samegoal.to_date(@endDate);
    DECLARE @today date = SYSDATETIME();
    DECLARE @key nvarchar(4000) = CONCAT(@flag, N' ', @startDate);
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'startDate', @start);
    DECLARE @other date = (
        SELECT MIN(startDate)
        FROM samegoal.ProgramFlag
        WHERE personID = @personID
            AND flag COLLATE Latin1_General_BIN2 = @flag
            AND startDate <> @start
            AND retiredDate IS NULL
            AND (endDate IS NULL OR endDate >= @today)
    );
    DECLARE @copies int = (
        SELECT COUNT(*)
        FROM samegoal.ProgramFlag
        WHERE personID = @personID
            AND flag COLLATE Latin1_General_BIN2 = @flag
            AND startDate = @start
    );

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @flag IS NULL THEN N'flag is missing'
        WHEN LEN(@flag) > 50 THEN N'flag is longer than 50 characters'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
        WHEN @endDate IS NOT NULL AND @end IS NULL THEN N'endDate is not a date (YYYY-MM-DD)'
        WHEN @end < @start THEN N'endDate is before startDate'
        WHEN @copies > 1
            THEN N'the SIS has this flag more than once. Try: delete all but one of them in the SIS'
        WHEN @other IS NOT NULL AND (@end IS NULL OR @end >= @today)
            THEN CONCAT(
                N'the student already has this flag, active since ',
                CONVERT(char(10), @other, 23),
                N'. Try: end the older flag in the SIS, or correct its dates in SameGoal'
            )
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'program flag', @studentNumber, @key, @problem;

    BEGIN TRY
        UPDATE samegoal.ProgramFlag WITH (UPDLOCK, HOLDLOCK)
        SET
            endDate = @end,
            endedByExit = 0,
            retiredDate = NULL,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND flag COLLATE Latin1_General_BIN2 = @flag
            AND startDate = @start
            AND (
                retiredDate IS NOT NULL
                OR EXISTS (
                    SELECT CASE WHEN endedByExit = 0 THEN endDate END
                    EXCEPT
                    SELECT @end
                )
            );

        IF @@ROWCOUNT = 0
            INSERT INTO samegoal.ProgramFlag (
                personID,
                flag,
                startDate,
                endDate,
                endedByExit,
                modifiedDate
            )
            SELECT
                @personID,
                @flag,
                @start,
                @end,
                0,
                SYSDATETIME()
            WHERE NOT EXISTS (
                SELECT 1
                FROM samegoal.ProgramFlag WITH (UPDLOCK, HOLDLOCK)
                WHERE personID = @personID
                    AND flag COLLATE Latin1_General_BIN2 = @flag
                    AND startDate = @start
            );
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'program flag', @studentNumber, @key, @problem;
    END CATCH;
END;
GO

IF OBJECT_ID(N'dbo.sg_program_flag_delete', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_program_flag_delete AS SELECT 1;');
GO

-- Retires the flag and ends it today, or on its start date if that is in the future. An earlier
-- endDate stays.
ALTER PROCEDURE dbo.sg_program_flag_delete
    @studentNumber nvarchar(4000),
    @flag nvarchar(4000),
    @startDate nvarchar(4000)
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @personID int = samegoal.to_person_id(@studentNumber);
    DECLARE @start date = samegoal.to_date(@startDate);
    DECLARE @today date = SYSDATETIME();
    DECLARE @key nvarchar(4000) = CONCAT(@flag, N' ', @startDate);
    DECLARE @early nvarchar(4000) = samegoal.cutover_problem(N'startDate', @start);

    DECLARE @problem nvarchar(4000) = CASE
        WHEN @personID IS NULL THEN N'no student, or more than one, has this number'
        WHEN @flag IS NULL THEN N'flag is missing'
        WHEN @start IS NULL THEN N'startDate is not a date (YYYY-MM-DD)'
        WHEN @early IS NOT NULL THEN @early
    END;

    IF @problem IS NOT NULL
        EXEC samegoal.fail N'program flag', @studentNumber, @key, @problem;

    BEGIN TRY
        UPDATE samegoal.ProgramFlag
        SET
            endDate = CASE
                WHEN endDate < @today THEN endDate
                WHEN startDate > @today THEN startDate
                ELSE @today
            END,
            retiredDate = @today,
            modifiedDate = SYSDATETIME()
        WHERE personID = @personID
            AND flag COLLATE Latin1_General_BIN2 = @flag
            AND startDate = @start
            AND retiredDate IS NULL;
    END TRY
    BEGIN CATCH
        IF ERROR_NUMBER() IN (1205, 1222) OR XACT_STATE() = -1
            THROW;
        SET @problem = ERROR_MESSAGE();
        EXEC samegoal.fail N'program flag', @studentNumber, @key, @problem;
    END CATCH;
END;
GO

----------------------------------------------------------------------------------------------------
-- 10. Cleanup (optional: the first statement of the Upload element, commented out in config.xml)
----------------------------------------------------------------------------------------------------

IF OBJECT_ID(N'dbo.sg_cleanup', N'P') IS NULL
    EXEC (N'CREATE PROCEDURE dbo.sg_cleanup AS SELECT 1;');
GO

-- For districts that want a flag to end with the student's enrollment. SameGoal itself ends it only
-- when the student leaves special education. This ends open flags on the student's exit date, moves
-- that date when the SIS corrects it, and reopens the flag when the student comes back. A second
-- call changes nothing. Flags that SameGoal ended, and flags from before the cutover date, are left
-- alone.
ALTER PROCEDURE dbo.sg_cleanup
AS
BEGIN
    SET NOCOUNT ON;
    SET XACT_ABORT OFF;

    DECLARE @today date = SYSDATETIME();
    DECLARE @cutover date = (SELECT cutoverDate FROM samegoal.Settings);
    DECLARE @change TABLE (
        programFlagID int NOT NULL PRIMARY KEY,
        endDate date NULL
    );

    -- In two steps, because a view with INSTEAD OF triggers cannot be updated through a join.
    INSERT INTO @change (programFlagID, endDate)
    SELECT flag.programFlagID, flag.wanted
    FROM (
        SELECT
            f.programFlagID,
            f.endDate,
            CASE
                WHEN s.exitDate > @today THEN NULL
                WHEN s.exitDate < f.startDate THEN f.startDate
                ELSE s.exitDate
            END AS wanted
        FROM samegoal.ProgramFlag AS f
            INNER JOIN samegoal.Student AS s ON s.personID = f.personID
        WHERE f.retiredDate IS NULL
            AND f.startDate >= @cutover
            AND (f.endDate IS NULL OR f.endedByExit = 1)
    ) AS flag
    WHERE EXISTS (SELECT flag.endDate EXCEPT SELECT flag.wanted);

    UPDATE f
    SET
        endDate = (SELECT c.endDate FROM @change AS c WHERE c.programFlagID = f.programFlagID),
        endedByExit = (
            SELECT CASE WHEN c.endDate IS NULL THEN 0 ELSE 1 END
            FROM @change AS c
            WHERE c.programFlagID = f.programFlagID
        ),
        modifiedDate = SYSDATETIME()
    FROM samegoal.ProgramFlag AS f
    WHERE f.programFlagID IN (SELECT c.programFlagID FROM @change AS c);
END;
GO

----------------------------------------------------------------------------------------------------
-- 11. Permissions
--
-- The account of the nightly job needs these permissions and no others. Remove the leading dashes
-- and replace DISTRICT\sgsync with the account's name: a Windows account, as here, or a SQL login.
-- If section 2 has a synonym, also grant SELECT on its table.
--
-- IF DATABASE_PRINCIPAL_ID(N'samegoal_service') IS NULL
--     CREATE ROLE samegoal_service AUTHORIZATION dbo;
-- GRANT SELECT ON SCHEMA::samegoal TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_iep_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_iep_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_services_plan_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_services_plan_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_evaluation_team_report_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_evaluation_team_report_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_special_ed_date_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_special_ed_date_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_program_flag_upsert TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_program_flag_delete TO samegoal_service;
-- GRANT EXECUTE ON dbo.sg_cleanup TO samegoal_service;
--
-- IF DATABASE_PRINCIPAL_ID(N'DISTRICT\sgsync') IS NULL
--     CREATE USER [DISTRICT\sgsync] FOR LOGIN [DISTRICT\sgsync];
-- ALTER ROLE samegoal_service ADD MEMBER [DISTRICT\sgsync];
----------------------------------------------------------------------------------------------------

SET NOEXEC OFF;
GO
